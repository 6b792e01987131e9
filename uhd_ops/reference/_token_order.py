# SPDX-License-Identifier: Apache-2.0
"""Token orders, as plain index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch

from uhd_ops.reference._windows import as_pairs

TokenOrder: TypeAlias = Literal["raster", "block", "window"] | Sequence[int]


def tokens_in_order(grids, order, window=None, device=None) -> torch.Tensor:
    """Return the packed raster index of the token at every place, ``(N,)`` int64.

    Tokens of a view are sorted by the row and column of their block, then by those of the next
    smaller block inside it, and so on; at last by their own row and column.
    """
    sides = {"raster": (), "block": (2,), "window": (window,)}.get(str(order), order)
    parts = [torch.empty(0, dtype=torch.int64)]
    start = 0
    for height, width in as_pairs(grids):
        token = torch.arange(height * width)
        row, col = token // max(width, 1), token % max(width, 1)
        keys = []
        for side in sides:
            keys += [row // side, col // side]
            row, col = row % side, col % side
        # Raster order is there already; ONNX has no stable sort.
        for key in reversed([*keys, row, col] if keys else []):
            token = token[key[token].argsort(stable=True)]  # what was sorted before decides ties
        parts.append(start + token)
        start += height * width
    return torch.cat(parts).to(device)


def to_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of this order in raster order."""
    return x[tokens_in_order(grids, order, window, x.device).argsort()]


def from_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of raster order in this order."""
    return x[tokens_in_order(grids, order, window, x.device)]
