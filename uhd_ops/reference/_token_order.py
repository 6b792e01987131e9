# SPDX-License-Identifier: Apache-2.0
"""Token orders, as plain index tensors."""

from __future__ import annotations

import torch

from uhd_ops.reference._windows import as_pairs


def tokens_in_order(grids, order, window=None, device=None) -> torch.Tensor:
    """Return the packed raster index of the token at every place, ``(N,)`` int64.

    Tokens of a view are sorted by the row and column of their block, then by those of the next
    smaller block inside it, and so on; at last by their own row and column.
    """
    sides = {"raster": (), "block": (2,), "window": (window,)}.get(str(order), order)

    def place(token, width):
        row, col = divmod(token, width)
        keys = []
        for side in sides:
            keys += [row // side, col // side]
            row, col = row % side, col % side
        return *keys, row, col

    tokens = []
    for height, width in as_pairs(grids):
        view = sorted(range(height * width), key=lambda token, width=width: place(token, width))
        tokens += [len(tokens) + token for token in view]
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def to_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of this order in raster order."""
    return x[tokens_in_order(grids, order, window, x.device).argsort()]


def from_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of raster order in this order."""
    return x[tokens_in_order(grids, order, window, x.device)]
