# SPDX-License-Identifier: Apache-2.0
"""Where the attention inside windows goes: a map over the image, and one window head by head."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from uhd_ops._checks import check_positive_int, check_tensor
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.ops.window_attention import window_attention
from uhd_ops.plot.figures import ORANGE, panels
from uhd_ops.plot.images import Box, check_views, draw_tokens
from uhd_ops.slicing.plan import SlicePlan
from uhd_ops.windows import Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    grids: Grids,
    plan: SlicePlan | None = None,
    *,
    window: int = 2,
    at: tuple[int, int, int] | None = None,
    scale: float | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw where the attention inside windows goes: over the image, and of one window head by head.

    The map shows what each token gets from the queries of its window, the mean over the heads: 1
    where all tokens of the window get the same. The weights are read off
    :func:`uhd_ops.window_attention` itself, whose values are unit vectors for that.

    Args:
        q: Queries ``(N, H, D)`` of packed tokens.
        k: Keys likewise, or with fewer heads.
        grids: Their grids, thumbnail first.
        plan: The plan of the views; None for tokens of one view.
        window: Side of a window, in tokens.
        at: The window that is drawn head by head: its view, row and column, counted in windows from
            0. None for the one with the least even weights among those of the map.
        scale: Factor on the scores; None means ``D ** -0.5``.
        figure: Where to draw; it gets the size that this takes. None for a new one of pyplot.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If shapes, the numbers of tokens or views, or ``at`` do not fit.

    Example:
        >>> qk = torch.randn(2, 4 * 6, 3, 8)
        >>> figure = attention(*qk, [(4, 6)], at=(0, 1, 2))
        >>> figure.axes[1].get_title().splitlines()
        ['window (1, 2) of view 0, 3 heads:', 'queries in rows, keys in columns']
    """
    grids, window = PackedGrids.of(grids), check_positive_int(window, "window")
    weights = _weights(q, k, grids, window, scale)
    shown = check_views(grids, plan)
    where = Windows.of(grids, window, torch.device("cpu"))
    received = _received(weights, where)
    index, (view, row, column) = _chosen_window(weights, grids, window, shown, at)
    size = plan.image_size if plan is not None else grids[0][::-1]
    left, right = panels(figure, 2, *size)
    draw_tokens(left, received, grids, plan, "attention that a token gets; 1: its even share")
    left.set_title(f"{left.get_title()}, windows of {window}x{window}", fontsize=10)
    _mark(left, _window_box(grids[view], window, row, column, shown[view]))
    token, present = where.slots()
    cells = token[index][present[index]]
    matrices = weights[cells][..., present[index]].transpose(0, 1)  # (H, n, n)
    tiles = _tiled(matrices)
    bar = right.imshow(tiles, vmin=0, cmap="magma", interpolation="nearest")
    right.set(xticks=(), yticks=(), anchor="N")
    right.set_title(
        f"window ({row}, {column}) of view {view}, {len(matrices)} heads:\n"
        "queries in rows, keys in columns",
        fontsize=10,
    )
    right.get_figure().colorbar(bar, ax=right, label="weight of a key", panchor=False)
    return right.get_figure()


def _weights(
    q: torch.Tensor, k: torch.Tensor, grids: PackedGrids, window: int, scale: float | None
) -> torch.Tensor:
    """Return the weights of the keys of a query's window, ``(N, H, window²)``; 0 where none is."""
    check_tensor(q, "q")
    check_tensor(k, "k")
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"q and k must be (N, H, D), got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    q, k = (x.detach().cpu().float() for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    room = max(window**2 - q.shape[-1], 0)  # channels of zeros change no score
    q, k = (torch.nn.functional.pad(x, (0, room)) for x in (q, k))
    values = torch.zeros_like(k)
    slot = Windows.of(grids, window, q.device).slot_of_token().long() % window**2
    if len(slot) == len(values):  # else the operator says what does not fit
        values.scatter_(2, slot[:, None, None].expand(-1, values.shape[1], 1), 1.0)
    return window_attention(q, k, values, grids, window, scale=scale)[..., : window**2]


def _received(weights: torch.Tensor, where: Windows) -> torch.Tensor:
    """Sum over the queries of a window, mean over the heads: what each key gets, ``(N,)``."""
    window_of_token = where.window_of_token().long()
    sums = weights.new_zeros(where.num_windows, weights.shape[2])
    sums.index_add_(0, window_of_token, weights.mean(1))
    return sums.flatten()[where.slot_of_token().long()].double()


def _chosen_window(
    weights: torch.Tensor,
    grids: PackedGrids,
    window: int,
    shown: dict[int, Box],
    at: tuple[int, int, int] | None,
) -> tuple[int, tuple[int, int, int]]:
    """Return the window that is looked at: its index, and its view, row and column."""
    sides = list(grids.merged(window))
    first = [0, *accumulate(rows * columns for rows, columns in sides)]
    if at is None:
        where = Windows.of(grids, window, weights.device)
        index, sizes = where.window_of_token().long(), where.sizes()
        entropy = -torch.xlogy(weights, weights).sum(2).mean(1)
        sums = entropy.new_zeros(first[-1]).index_add_(0, index, entropy)
        on_map = torch.zeros_like(sizes, dtype=torch.bool)
        for view in shown:
            on_map[first[view] : first[view + 1]] = True
        # A ragged window has less to choose from: only if there is no other.
        whole = on_map & (sizes == sizes[on_map].max())
        chosen = int(sums.masked_fill(~whole, math.inf).argmin())
        view = next(v for v in shown if first[v] <= chosen < first[v + 1])
        return chosen, (view, *divmod(chosen - first[view], sides[view][1]))
    if len(at) != 3:
        raise ValueError(f"at must be (view, row, column), got {at}")
    view, row, column = at
    inside = view in shown and 0 <= row < sides[view][0] and 0 <= column < sides[view][1]
    if not inside:
        raise ValueError(
            f"at must be a window of a view on the map, {sorted(shown)}, whose windows are "
            f"{[sides[v] for v in sorted(shown)]}, got {at}"
        )
    return first[view] + row * sides[view][1] + column, (view, row, column)


def _window_box(grid: tuple[int, int], window: int, row: int, column: int, box: Box) -> Box:
    left, top, width, height = box
    across, down = width / grid[1], height / grid[0]
    columns, rows = (
        min(window, grid[1] - column * window),
        min(window, grid[0] - row * window),
    )
    return (
        left + column * window * across,
        top + row * window * down,
        columns * across,
        rows * down,
    )


def _mark(axes: Axes, box: Box) -> None:
    """A frame around a window, and a ring around that, since the window may be small."""
    from matplotlib.patches import Rectangle

    left, top, width, height = box
    axes.add_patch(Rectangle((left, top), width, height, fill=False, ec=ORANGE, lw=1.5))
    axes.plot(left + width / 2, top + height / 2, "o", mfc="none", mec=ORANGE, ms=16, mew=1.5)


def _tiled(matrices: torch.Tensor) -> Any:
    """Lay square matrices ``(H, n, n)`` out in rows, with an empty cell between them."""
    heads, side, _ = matrices.shape
    across = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / across)
    tiles = torch.full((rows * (side + 1) - 1, across * (side + 1) - 1), math.nan)
    for head, matrix in enumerate(matrices):
        row, column = (place * (side + 1) for place in divmod(head, across))
        tiles[row : row + side, column : column + side] = matrix
    return tiles.numpy()
