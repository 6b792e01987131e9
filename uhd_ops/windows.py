# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a call are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from uhd_ops import _native
from uhd_ops._checks import check_tensor
from uhd_ops.grids import Grids, PackedGrids, is_single_pair, pairs_of
from uhd_ops.padded_grids import PaddedGrids


class Layout(NamedTuple):
    """Where the tokens of one call are.

    ``batch`` is None for packed tokens ``(N, ...)`` and B for batched tokens ``(B, h*w, ...)`` of
    one grid.
    """

    # The kernels' view table (S + 1, 4), on the device of the tokens; None where no kernels are.
    views: torch.Tensor | None
    tokens: int  # of all views, or of each view of a batch
    windows: int  # likewise
    batch: int | None
    padded: bool = False  # tokens and windows are capacities
    # Keeps what is derived from the view table; None where nothing may be kept.
    packed: PackedGrids | None = None

    @property
    def num_windows(self) -> int:
        """Windows of the whole call, M."""
        return self.windows if self.batch is None else self.windows * self.batch

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, h*w, ...)`` to ``(N, ...)``; packed tokens as they are."""
        return x if self.batch is None else x.reshape(self.batch * self.tokens, *x.shape[2:])

    def unpack_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, ...)`` to ``(B, h*w, ...)`` where the input was batched."""
        return x if self.batch is None else x.reshape(self.batch, self.tokens, *x.shape[1:])

    def unpack_windows(self, x: torch.Tensor) -> torch.Tensor:
        """``(M, ...)`` to ``(B, M / B, ...)`` where the input was batched."""
        return x if self.batch is None else x.reshape(self.batch, self.windows, *x.shape[1:])

    def zero_padding(self, x: torch.Tensor) -> torch.Tensor:
        """``(M, ...)`` with zeros in the rows beyond the windows that there are."""
        if not self.padded:
            return x
        beyond = torch.arange(self.windows, device=x.device) >= self.views[-1, 3]
        return x.masked_fill(beyond.view(-1, *(1,) * (x.dim() - 1)), 0)


def layout_of(
    x: torch.Tensor, name: str, grids: Grids, window: int, trailing: tuple[str, ...]
) -> Layout:
    """Match tokens ``x`` against ``grids``.

    Args:
        x: ``(N, *trailing)``, or ``(B, h*w, *trailing)`` with a single ``(h, w)`` pair.
        name: What the caller calls ``x``, for messages.
        grids: Grids in any accepted form.
        window: Window side, checked before.
        trailing: Names of the dimensions after the tokens, such as ``("C",)``.

    Raises:
        TypeError: ``grids`` has no accepted form.
        ValueError: The number of tokens or dimensions does not fit.
    """
    dims, shape = len(trailing), ", ".join(trailing)
    batched = x.dim() == dims + 2
    if not batched and x.dim() != dims + 1:
        raise ValueError(
            f"{name} must be (N, {shape}), or (B, h*w, {shape}) with one (h, w) grid, "
            f"got shape {tuple(x.shape)}"
        )
    if batched and not is_single_pair(grids):
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} is batched, so grids must be one (h, w) pair; "
            f"pack the views into (N, {shape}) for several grids"
        )
    layout = _look_up(x, grids, window, x.shape[0] if batched else None)
    if x.shape[1 if batched else 0] != layout.tokens:
        if layout.padded:
            raise ValueError(
                f"{name} must be (N, {shape}) with N = {layout.tokens} tokens (max_tokens of the "
                f"PaddedGrids), got shape {tuple(x.shape)}"
            )
        form = f"(B, h*w, {shape}) with h*w" if batched else f"(N, {shape}) with N"
        raise ValueError(
            f"{name} must be {form} = {layout.tokens} tokens (sum of h*w over grids), "
            f"got shape {tuple(x.shape)}"
        )
    return layout


def check_tokens(x: object, grids: Grids, window: int, channels: int) -> Layout:
    """``x`` holds the tokens of ``grids`` with so many channels; returns where they are."""
    check_tensor(x, "x")
    layout = layout_of(x, "x", grids, window, ("C",))
    if x.shape[-1] != channels:
        raise ValueError(f"x must have C = {channels} channels, got shape {tuple(x.shape)}")
    return layout


def is_tracing(x: torch.Tensor) -> bool:
    """Whether sizes may be symbols and tensors may hold no data."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _look_up(x: torch.Tensor, grids: Grids, window: int, batch: int | None) -> Layout:
    if isinstance(grids, PaddedGrids):
        if not _native.has_kernels(x.device):
            raise NotImplementedError(
                f"grids: PaddedGrids need the native kernels, which are not loaded for {x.device}; "
                "see uhd_ops.build_info()"
            )
        views = grids.view_table(window, x.device)
        return Layout(views, grids.num_tokens, grids.num_windows(window), None, padded=True)
    if not is_tracing(x):
        one = PackedGrids.of(grids)
        every = one if batch is None else PackedGrids.of(grids, batch)
        views = every.view_table(window, x.device) if _native.has_kernels(x.device) else None
        return Layout(views, one.num_tokens, one.num_windows(window), batch, packed=every)
    if isinstance(grids, PackedGrids) and torch.compiler.is_compiling():
        views = grids.view_table(window, x.device)
        return Layout(views, grids.num_tokens, grids.num_windows(window), None)
    return _look_up_symbolic(x, grids, window, batch)


def _look_up_symbolic(x: torch.Tensor, grids: Grids, window: int, batch: int | None) -> Layout:
    # Sides may be symbols here (a grid that a traced model computes from its input's shape), so
    # nothing is cached and the table is made by an operator inside the graph.
    if isinstance(grids, torch.Tensor):
        raise TypeError(
            "grids must be a PackedGrids or (h, w) pairs while tracing, got a tensor, whose values "
            "are unknown then; make a PackedGrids before the traced function"
        )
    pairs = (tuple(grids),) if is_single_pair(grids) else pairs_of(grids)
    tokens = windows = 0
    sides: list[int] = []
    for height, width in pairs:
        if height < 0 or width < 0:
            raise ValueError(f"grids must not have negative sides, got ({height}, {width})")
        tokens += height * width
        windows += ((height + window - 1) // window) * ((width + window - 1) // window)
        sides += [height, width]
    if not _native.has_kernels(x.device):
        return Layout(None, tokens, windows, batch)
    views = torch.ops.uhd_ops._view_table(sides, 1 if batch is None else batch, window)
    return Layout(views.to(x.device), tokens, windows, batch)


if _native.status["cpu"] == "loaded":

    @torch.library.register_fake("uhd_ops::_view_table")
    def _(sides, repeat, window):
        return torch.empty((len(sides) // 2 * repeat + 1, 4), dtype=torch.int64, device="cpu")

    @torch.library.register_fake("uhd_ops::_view_table_from_rows")
    def _(rows, window):
        return rows.new_empty((rows.shape[0], 4))
