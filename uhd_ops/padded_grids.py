# SPDX-License-Identifier: Apache-2.0
"""Grids that change from call to call while every size stays the same, for CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from uhd_ops._cache import staged
from uhd_ops._checks import check_device, check_int
from uhd_ops.grids import Grids, PackedGrids, pairs_of


class PaddedGrids:
    """Grids of a batch that is padded to a capacity, kept on the device.

    A CUDA graph replays the same launches on the same memory, so tensors must keep their sizes, and
    the grids must lie where a kernel can read them. Tensors with one row per token then have
    ``max_tokens`` rows, those with one row per window ``windows[f]`` rows. The rows beyond what the
    current grids need are padding: operators never read them, and write zeros to them in results
    and gradients. What the kernels compute for a row does not depend on the capacity, bit for bit.

    Operators accept it as ``grids`` wherever they take packed tokens; ``view_attention`` does not.

    Args:
        max_tokens: Rows of tensors with one row per token.
        max_views: The most views of one batch.
        windows: The window sides that will be used, and for each the rows of tensors with one row
            per window. An iterable of sides means ``max_tokens`` rows each, which is always enough;
            where every side of a view is a multiple of f, ``max_tokens // f**2`` is.
        device: Where the tokens are.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is less than 1, or the device is not there.

    Example:
        >>> grids = PaddedGrids(max_tokens=64, max_views=4, windows={2: 16}, device="cpu")
        >>> grids.update([(4, 6), (2, 2)])
        >>> out = uhd_ops.window_mean(torch.ones(64, 8), grids)
        >>> out.shape, int(out.any(1).sum())
        (torch.Size([16, 8]), 7)
    """

    def __init__(
        self,
        max_tokens: int,
        max_views: int,
        windows: Mapping[int, int] | Iterable[int] = (2,),
        device: torch.device | str = "cuda",
    ) -> None:
        self.device = device = check_device(device)
        self.num_tokens = check_int(max_tokens, "max_tokens", 1)
        self.max_views = check_int(max_views, "max_views", 1)
        if not isinstance(windows, Mapping):
            windows = dict.fromkeys(windows, max_tokens)
        self._rows = {
            check_int(side, "a window side", 1): check_int(rows, f"windows[{side}]", 1)
            for side, rows in windows.items()
        }
        self._merged: dict[int, PaddedGrids] = {}
        with torch.inference_mode(False):
            self.cu_seqlens = torch.zeros(max_views + 1, dtype=torch.int32, device=device)
            self._tables = {
                side: torch.zeros((max_views + 1, 4), dtype=torch.int64, device=device)
                for side in self._rows
            }
        self.current = PackedGrids([])

    def update(self, grids: Grids) -> None:
        """Make ``grids`` the current ones, without waiting for the device.

        On CUDA the copies are queued on the current stream, behind what already reads the old grids
        there; as for any tensor, other streams have to be waited for. On the CPU the tables are new
        ones, so that another thread's call goes on with those that it started with.

        Args:
            grids: Grids of the next batch, in any form that PackedGrids takes.

        Raises:
            TypeError: ``grids`` has no accepted form.
            ValueError: They need more tokens, views or windows than there is room for. Nothing is
                changed then.
            NotImplementedError: A CUDA graph is being captured. Likewise.
        """
        grids = PackedGrids(pairs_of(grids))
        self._check(grids)
        for factor, child in self._merged.items():
            child._check(grids.merged(factor))
        self._put(grids)

    @property
    def windows(self) -> tuple[int, ...]:
        """The window sides that these grids were made for."""
        return tuple(self._rows)

    def num_windows(self, window: int) -> int:
        """Rows of tensors with one row per window of this side."""
        return self._rows[self._known(window)]

    def merged(self, factor: int = 2) -> PaddedGrids:
        """Grids of the merged tokens; they follow the updates of these."""
        if factor not in self._merged:
            child = PaddedGrids(
                self.num_windows(factor), self.max_views, tuple(self._rows), self.device
            )
            child._put(self.current.merged(factor))
            self._merged[factor] = child
        return self._merged[factor]

    def view_table(self, window: int, device: torch.device) -> torch.Tensor:
        """Return the kernels' table for one window side; on CUDA ``update`` changes it in place."""
        if device != self.device:
            raise ValueError(f"grids are on {self.device}, but the tokens are on {device}")
        return self._tables[self._known(window)]

    def __repr__(self) -> str:
        return (
            f"PaddedGrids(max_tokens={self.num_tokens}, max_views={self.max_views}, "
            f"windows={self._rows}, device={str(self.device)!r}, current={self.current})"
        )

    def __getstate__(self) -> Any:
        raise TypeError("PaddedGrids belongs to a device and to captured graphs; it has no copies")

    def _known(self, window: int) -> int:
        if window not in self._rows:
            raise ValueError(
                f"window must be one of {list(self._rows)}, the sides that these "
                f"PaddedGrids were made for, got {window}"
            )
        return window

    def _check(self, grids: PackedGrids) -> None:
        need = [(grids.num_tokens, self.num_tokens, "tokens, more than max_tokens")]
        need += [(grids.num_views, self.max_views, "views, more than max_views")]
        need += [
            (grids.num_windows(side), rows, f"windows of side {side}, more than windows[{side}]")
            for side, rows in self._rows.items()
        ]
        for count, room, what in need:
            if count > room:
                raise ValueError(f"grids hold {count} {what} = {room}")

    def _put(self, grids: PackedGrids) -> None:
        self._tables = {
            side: self._updated(table, grids.view_table(side, torch.device("cpu")))
            for side, table in self._tables.items()
        }
        self.cu_seqlens = self._updated(self.cu_seqlens, grids.cu_seqlens())
        self.current = grids
        for factor, child in self._merged.items():
            child._put(grids.merged(factor))

    def _updated(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the table with these rows: itself, where a CUDA graph has its address."""
        # The last row holds the totals: repeated, it describes views without tokens.
        with torch.no_grad(), torch.inference_mode(False):
            padded = rows.new_empty(table.shape)
            padded[: len(rows)] = rows
            padded[len(rows) :] = rows[-1]
            if table.dim() == 2:
                padded[len(rows) - 1 :, 1:3] = 0
            if self.device.type == "cpu":
                return padded
            return table.copy_(staged(padded, self.device), non_blocking=True)
