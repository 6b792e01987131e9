# SPDX-License-Identifier: Apache-2.0
"""Which tokens each window holds, as plain index tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

# As the public functions take them; a PackedGrids yields pairs.
Grids: TypeAlias = Iterable[Sequence[int]] | Sequence[int] | torch.Tensor


def as_pairs(grids: Grids) -> list[tuple[int, int]]:
    """``grids`` in any accepted form as a list of ``(h, w)`` pairs."""
    if isinstance(grids, torch.Tensor):
        grids = grids.tolist()
    grids = list(grids)
    if len(grids) == 2 and all(isinstance(side, int) for side in grids):
        grids = [tuple(grids)]
    return [(int(h), int(w)) for h, w in grids]


def window_tokens(grids, window: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """List the tokens of every window.

    Args:
        grids: Grids of the packed views.
        window: Side f of a window.
        device: Where to put the result.

    Returns:
        Two tensors of shape ``(M, f*f)``, slots in raster order inside the window. ``tokens``
        (int64): the packed index of the token in the slot, or of the nearest present token where a
        ragged window has none.
        ``present`` (bool): whether the slot has a token of its own.
    """
    tokens, present = [], []
    start = 0
    for height, width in as_pairs(grids):
        if height * width:
            rows = torch.arange(-(-height // window) * window)
            cols = torch.arange(-(-width // window) * window)
            token = rows.clamp(max=height - 1)[:, None] * width + cols.clamp(max=width - 1)
            inside = (rows < height)[:, None] & (cols < width)
            tokens.append(start + _split(token, window))
            present.append(_split(inside, window))
        start += height * width
    if not tokens:
        shape = (0, window * window)
        return (
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=torch.bool, device=device),
        )
    return torch.cat(tokens).to(device), torch.cat(present).to(device)


def _split(grid: torch.Tensor, f: int) -> torch.Tensor:
    height, width = grid.shape
    return grid.view(height // f, f, width // f, f).transpose(1, 2).reshape(-1, f * f)


def clamped_window(grids, window: int) -> int:
    """``window``, or a smaller side that cuts these views into the same windows."""
    return min(window, max((max(pair) for pair in as_pairs(grids)), default=1) or 1)


def packed(x: torch.Tensor, grids, feature_dims: int) -> tuple[torch.Tensor, list, int | None]:
    """``(B, h*w, ...)`` with one grid to ``(B*h*w, ...)`` with B grids; packed tokens as they are.

    Returns:
        The packed tokens, their grids, and B (None for tokens that were packed already).
    """
    pairs = as_pairs(grids)
    if x.dim() == feature_dims + 1:
        return x, pairs, None
    return x.flatten(0, 1), pairs * x.shape[0], x.shape[0]


def unpacked(x: torch.Tensor, grids, batch: int | None, window: int = 1) -> torch.Tensor:
    """``(B*m, ...)`` to ``(B, m, ...)`` with m windows per grid; packed results as they are."""
    if batch is None:
        return x
    ((height, width),) = as_pairs(grids)
    return x.unflatten(0, (batch, -(-height // window) * -(-width // window)))
