# SPDX-License-Identifier: Apache-2.0
"""Token orders other than raster order.

An order is the tuple of sides of nested blocks, the outermost first: ``()`` is raster order,
``(2,)`` is 2 x 2-block-major, ``(8, 2)`` puts the 8 x 8 blocks of a view one after the other and
orders each of them by 2 x 2 blocks. Blocks at the right and bottom edge may hold fewer tokens.

Everything here is arithmetic on the kernels' view table, where that is: nothing is read back from a
device, and torch.compile makes one graph for all grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch

from uhd_ops import _checks, windows
from uhd_ops.grids import PackedGrids, _outlives_modes

TokenOrder: TypeAlias = str | Sequence[int]

_T = TypeVar("_T")
_NAMED = {"raster": (), "block": (2,)}


class Permute(torch.autograd.Function):
    """Rows in another order. The gradient is gathered too, where indexing would scatter it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, inverse):
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return Permute.apply(grad, inverse, index), None, None


def check_order(order: object, name: str, window: int | None = None) -> tuple[int, ...]:
    """Return the sides of ``order``; ``"window"`` means ``(window,)`` if there is a window."""
    named = _NAMED if window is None else {**_NAMED, "window": (window,)}
    if not isinstance(order, (str, tuple, list)) or (isinstance(order, str) and order not in named):
        names = ", ".join(f'"{known}"' for known in named)
        error = ValueError if isinstance(order, str) else TypeError
        got = repr(order) if isinstance(order, str) else type(order).__name__
        raise error(f"{name} must be {names} or sides of nested blocks such as (8, 2), got {got}")
    sides = named[order] if isinstance(order, str) else order
    sides = tuple(_checks.check_positive_int(side, f"every side in {name}") for side in sides)
    if any(inner >= outer for outer, inner in pairwise(sides)):
        raise ValueError(
            f"{name} must name blocks from the outermost to the innermost, each smaller than the "
            f"one around it, got {sides}"
        )
    return sides[:-1] if sides[-1:] == (1,) else sides  # blocks of one token order nothing


def reorder(
    x: torch.Tensor, layout: windows.Layout, order_in: tuple[int, ...], order: tuple[int, ...]
) -> torch.Tensor:
    """Return packed ``x (N, ...)`` in another order, or ``x`` itself where it is the same one."""
    return x if order_in == order else reordered_copy(x, layout, order_in, order)


def reordered_copy(
    x: torch.Tensor, layout: windows.Layout, order_in: tuple[int, ...], order: tuple[int, ...]
) -> torch.Tensor:
    """Do the same as :func:`reorder`, but into new memory in any case."""
    key = ("reorder", order_in, order, x.device)
    return Permute.apply(x, *_kept(layout, key, lambda: _permutation(layout, order_in, order)))


def arrange(
    x: torch.Tensor, layout: windows.Layout, order_in: tuple[int, ...], window: int
) -> tuple[torch.Tensor, windows.Layout]:
    """Return packed tokens, and a layout that finds their windows, for kernels that expect raster.

    The tokens move only if they do not lie window by window already.
    """
    if order_in == (window,):
        return x, by_window(layout, window)
    return reorder(x, layout, order_in, ()), layout


def by_window(layout: windows.Layout, window: int) -> windows.Layout:
    """Layout of tokens that lie window by window, whatever their order inside a window.

    A run of n full windows is one view of ``(n * window, window)`` tokens: its windows follow each
    other. A ragged window is a view of its own, and so is every window where nothing can be kept:
    the table's size must not depend on the grids' values there.
    """
    if layout.packed is None:
        return layout._replace(views=_window_views(layout, window))
    device = layout.views.device
    runs = _kept(layout, ("runs", window), lambda: PackedGrids(_runs(layout.packed, window)))
    return layout._replace(views=runs.view_table(window, device))


def _runs(grids: PackedGrids, window: int) -> list[tuple[int, int]]:
    """Return the fewest views whose windows are those of ``grids``, one behind the other."""
    runs = [(0, window)]

    def add(height: int, width: int) -> None:
        before = runs[-1]
        if before[1] == width == window and before[0] % window == 0:
            runs[-1] = (before[0] + height, window)
        else:
            runs.append((height, width))

    for height, width in grids:
        for top in range(0, height, window):
            rows = min(window, height - top)
            if rows == window:
                add(width // window * window, window)
            else:
                for _ in range(width // window):
                    add(rows, window)
            if width % window:
                add(rows, width % window)
    return runs


def _kept(layout: windows.Layout, key: tuple, make: Callable[[], _T]) -> _T:
    if layout.packed is None:
        return make()
    tables = layout.packed._tables
    if key not in tables:
        with _outlives_modes():
            tables[key] = make()
    return tables[key]


def _window_views(layout: windows.Layout, window: int) -> torch.Tensor:
    """Return the view table ``(M + 1, 4)`` in which every window is a view of its own.

    Windows beyond the last one get the totals and no tokens, as in the table of PaddedGrids.
    """
    index = torch.arange(layout.num_windows + 1, device=layout.views.device)
    first, height, width, first_window = _rows_of(layout.views, 3, index)
    total = layout.views[-1, 3]
    across = ((width + window - 1) // window).clamp(min=1)
    top = (index - first_window) // across * window
    left = (index - first_window) % across * window
    rows, cols = (height - top).clamp(0, window), (width - left).clamp(0, window)
    return torch.stack([first + top * width + left * rows, rows, cols, index.minimum(total)], 1)


def _permutation(
    layout: windows.Layout, order_in: tuple[int, ...], order: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row that goes to each row, ``(N,)`` int64, and the inverse."""
    (place_in, token_in), (place, token) = _places(layout, order_in), _places(layout, order)
    return place_in[token], place[token_in]


def _places(layout: windows.Layout, order: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place of every token, counted in raster order, and the token of every place."""
    count = layout.tokens if layout.batch is None else layout.tokens * layout.batch
    token = torch.arange(count, device=layout.views.device)
    if not order:
        return token, token
    first, height, width, _ = _rows_of(layout.views, 0, token)
    columns = width.clamp(min=1)  # no division by zero in the padding
    place = first + _place_in_view(
        (token - first) // columns, (token - first) % columns, height, width, order
    )
    place = torch.where(token < layout.views[-1, 0], place, token)  # padding stays where it is
    return place, torch.zeros_like(place).index_copy(0, place, token)


def _place_in_view(
    row: torch.Tensor,
    col: torch.Tensor,
    height: torch.Tensor,
    width: torch.Tensor,
    order: tuple[int, ...],
) -> torch.Tensor:
    """Return the places of the tokens at (row, col) among those of a view or block."""
    if not order:
        return row * width + col
    side = order[0]
    top, left = row // side * side, col // side * side
    rows, cols = (height - top).clamp(max=side), (width - left).clamp(max=side)
    # The rows of blocks above, the blocks to the left, and then the order within the block.
    return top * width + left * rows + _place_in_view(row - top, col - left, rows, cols, order[1:])


def _rows_of(views: torch.Tensor, column: int, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the columns of the view table for tokens (column 0) or windows (column 3)."""
    # The whole column, the totals included: torch.compile specialises on tensors of one row.
    after = torch.searchsorted(views[:, column].contiguous(), index, right=True)
    return views[after - 1].unbind(1)
