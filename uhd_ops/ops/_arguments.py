# SPDX-License-Identifier: Apache-2.0
"""Argument checks and grid look-up shared by the public operators.

Every check uses shapes, dtypes and devices only, so it raises the same error on CPU, on CUDA, under
FakeTensorMode and while torch.compile traces.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import NamedTuple

import torch
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from uhd_ops import _native
from uhd_ops.grids import Grids, PackedGrids, is_single_pair, pairs_of
from uhd_ops.padded_grids import PaddedGrids

# Sums of two such options and a side stay far below 2**63, in which kernels compute.
LARGEST_INT = 2**31 - 1
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def check_tensor(x: object, name: str) -> None:
    """``x`` is a tensor of a floating dtype that the kernels know."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, got layout {x.layout}")
    if not torch.compiler.is_compiling() and _is_transformed(x):
        raise NotImplementedError(
            f"{name} takes part in torch.func.grad, vjp, jvp or forward-mode differentiation, "
            "which uhd_ops operators do not support; use torch.autograd, or uhd_ops.reference, "
            "which supports them"
        )


def _is_transformed(x: torch.Tensor) -> bool:
    # torch itself would refuse torch.func.grad with a message about setup_context, and would drop
    # the tangents of forward mode without a word.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    while functorch.is_functorch_wrapped_tensor(x):  # torch.vmap alone is supported
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_like(x: object, name: str, other: torch.Tensor, other_name: str) -> None:
    """``x`` is a tensor with the device of ``other`` and its dtype.

    Where autocast is on, any two dtypes do that it casts to the same one: all but float64.
    """
    check_tensor(x, name)
    cast = torch.float64 not in (x.dtype, other.dtype) and _autocast_dtype(other) is not None
    if x.dtype != other.dtype and not cast:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_same_shape(x: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """``x`` has the shape of ``other``."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(x.shape)}"
        )


def check_positive_int(value: object, name: str) -> int:
    """``value`` is an integer in [1, LARGEST_INT], NumPy's included; returns it as an int."""
    value = check_int(value, name)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > LARGEST_INT:
        raise ValueError(f"{name} must be at most {LARGEST_INT}, got {value}")
    return value


def check_int(value: object, name: str) -> int:
    """``value`` is an integer, NumPy's included, and no bool; returns it as an int."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # operator.index would fix a symbol's value
    # A tensor has an index too, but to read it waits for its device; and torch.compile makes a
    # tensor of a NumPy integer.
    if not isinstance(value, (bool, torch.Tensor)) and not torch.compiler.is_compiling():
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_finite(value: object, name: str) -> float:
    """``value`` is a finite real number; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break torch.compile's graph
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast float32 and half tensors to the autocast dtype of their device, where autocast is on."""
    dtype = _autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x is not None and x.dtype != torch.float64 and x.is_floating_point() else x
        for x in tensors
    )


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


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
