# SPDX-License-Identifier: Apache-2.0
"""Token orders, as plain index tensors."""

from __future__ import annotations

import torch

from uhd_ops.reference._bad_inputs import bad
from uhd_ops.reference._spec import BadInput
from uhd_ops.reference._windows import as_pairs


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
        for key in reversed([*keys, row, col]):  # stable: what was sorted before decides ties
            token = token[key[token].argsort(stable=True)]
        parts.append(start + token)
        start += height * width
    return torch.cat(parts).to(device)


def to_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of this order in raster order."""
    return x[tokens_in_order(grids, order, window, x.device).argsort()]


def from_raster(x, grids, order, window=None) -> torch.Tensor:
    """Packed tokens ``(N, ...)`` of raster order in this order."""
    return x[tokens_in_order(grids, order, window, x.device)]


ORDERS = ("raster", "block", (3, 2))


def bad_order(name: str, with_window: bool = True) -> tuple[BadInput, ...]:
    """Spoil an argument that must be a token order."""
    names = '"raster", "block"' + ', "window"' * with_window
    known = f"{name} must be {names} or sides of nested blocks such as (8, 2), got "
    nested = (
        f"{name} must name blocks from the outermost to the innermost, each smaller than the one "
        "around it, got (2, 8)"
    )
    side = f"every side in {name} must be at least 1, got 0"
    return (
        bad(f"{name} rows", name, lambda _: "rows", ValueError, f"{known}'rows'"),
        bad(f"{name} int", name, lambda _: 2, TypeError, f"{known}int"),
        bad(f"{name} inside out", name, lambda _: (2, 8), ValueError, nested),
        bad(f"{name} zero", name, lambda _: (4, 0), ValueError, side),
    )
