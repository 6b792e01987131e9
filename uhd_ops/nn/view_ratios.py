# SPDX-License-Identifier: Apache-2.0
"""A compression ratio of its own for each view: kept, merged once, or merged several times.

Beyond the papers, whose compressors treat all views alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from uhd_ops._checks import check_positive_int, check_tensor
from uhd_ops.grids import Grids, PackedGrids, TracedGrids, rows_of_views
from uhd_ops.nn.early_compressor import EarlyCompressor
from uhd_ops.windows import locate

RATIOS = (1, 4, 16)


class ViewRatios:
    """A ratio for each view, and the grids that they leave.

    ``SliceEncoder`` makes one of a list. A list is part of a graph of torch.compile, with its
    length and its values; one that was made outside is data, like :class:`uhd_ops.PackedGrids`, so
    that three graphs serve all ratios of all grids.

    Args:
        ratios: One power of ``window²`` for each view.
        grids: Grids of the views, in patches.
        window: Side of the windows that the compressor merges.

    Attributes:
        views: The grids, as PackedGrids.
        window: As given.
        times: How often each view is merged.
        sides: Side of the windows, in patches, that become one token of each view.
        grids: What is left of the views.
        rows: ``times`` and ``sides`` as a tensor ``(S + 1, 2)``, int64 on the CPU, and a last row
            to be ignored.

    Raises:
        TypeError: ``grids`` has no accepted form, or ``ratios`` holds something that is not an int.
        ValueError: The numbers of views differ, or a ratio is not a power of ``window²``.

    Example:
        >>> ViewRatios([1, 4, 16], [(4, 6)] * 3).grids
        PackedGrids([(4, 6), (2, 3), (1, 2)])
    """

    def __init__(self, ratios: Sequence[int], grids: Grids, window: int = 2) -> None:
        self.views, self.window = PackedGrids.of(grids), window
        self.times = tuple(times_of(ratios, len(self.views), window))
        self.sides = tuple(window**count for count in self.times)
        pairs = zip(self.views, self.sides, strict=True)
        self.grids = PackedGrids([(-(-h // side), -(-w // side)) for (h, w), side in pairs])
        self.rows = rows_of_views(zip(self.times, self.sides, strict=True), (0, 1))
        self._tokens = self.views.num_tokens + self.grids.num_tokens  # as PackedGrids counts them

    def left(self, views: PackedGrids) -> PackedGrids:
        """``grids``; in a graph, where the views are data, as data too."""
        if not torch.compiler.is_compiling():
            return self.grids
        sides = self.rows[:, 1:]
        counts, less = {1: self._tokens}, views.num_tokens
        return TracedGrids((views.rows + sides - 1) // sides, counts=counts, less=less)

    @classmethod
    def of(cls, ratios: ViewRatios | Sequence[int], grids: PackedGrids, window: int) -> ViewRatios:
        """Return ratios in either form for these grids, and for windows of this side."""
        if not isinstance(ratios, ViewRatios):
            return cls(ratios, grids, window)
        if ratios.window != window:
            raise ValueError(f"ratios must be for windows of side {window}, got {ratios.window}")
        # In a graph the grids are data: there the operator compares what it gets.
        if not torch.compiler.is_compiling() and ratios.views != grids:
            raise ValueError(f"ratios must be for the grids {grids}, got those for {ratios.views}")
        return ratios


def merge_by_ratio(
    compressor: Callable[[torch.Tensor, PackedGrids], torch.Tensor],
    x: torch.Tensor,
    grids: Grids,
    ratios: Sequence[int],
    *,
    window: int = 2,
) -> tuple[torch.Tensor, PackedGrids]:
    """Merge the tokens of each view as often as its ratio says; differentiable.

    A view of ratio ``window²`` goes through the compressor once, one of ``window⁴`` twice, and so
    on; a view of ratio 1 is kept. All views that go through it together are one call. Where all
    ratios are equal, the result is that of calling the compressor on everything, bit for bit.

    Args:
        compressor: ``compressor(x, grids)`` merges packed tokens, as :class:`EarlyCompressor`.
        x: Packed tokens ``(N, C)``.
        grids: Their grids, S views.
        ratios: One power of ``window²`` for each view.
        window: Side of the windows that the compressor merges.

    Returns:
        Packed tokens of all views, in order, and their grids.

    Raises:
        TypeError: ``x`` is not a tensor of a floating dtype, ``grids`` has no accepted form, or
            ``ratios`` holds something that is not an int.
        ValueError: Numbers of tokens or views do not fit, or a ratio is not a power of ``window²``.

    Example:
        >>> from uhd_ops import window_mean
        >>> x, grids = torch.randn(3 * 16, 8), [(4, 4)] * 3
        >>> tokens, grids = merge_by_ratio(window_mean, x, grids, [1, 4, 16])
        >>> tokens.shape, grids
        (torch.Size([21, 8]), PackedGrids([(4, 4), (2, 2), (1, 1)]))
    """
    check_tensor(x, "x")
    grids = PackedGrids.of(grids)
    if x.dim() != 2:
        raise ValueError(f"x must be packed tokens (N, C), got shape {tuple(x.shape)}")
    locate(x, "x", grids, 1, ("C",))
    times = times_of(ratios, len(grids), window)
    for step in range(1, max(times, default=0) + 1):
        chosen = [count >= step for count in times]
        if all(chosen):
            x, grids = compressor(x, grids), grids.merged(window)
            continue
        views = list(x.split([height * width for height, width in grids]))
        some = PackedGrids([pair for pair, take in zip(grids, chosen, strict=True) if take])
        merged = compressor(torch.cat([v for v, t in zip(views, chosen, strict=True) if t]), some)
        parts = iter(merged.split([height * width for height, width in some.merged(window)]))
        views = [next(parts) if take else v for v, take in zip(views, chosen, strict=True)]
        coarse = iter(some.merged(window))
        x = torch.cat(views)
        grids = PackedGrids(
            [next(coarse) if t else pair for pair, t in zip(grids, chosen, strict=True)]
        )
    return x, grids


class Merge:
    """The compressor after one block of a model on packed views.

    Args:
        model: A ``uhd_ops.retrofit.packed.PackedModel``.
        index: Index of the block.
        side: Side of the windows that became one token before.
        ratios: Those of the views; None to merge all of them once.

    Attributes:
        sides: Side of the windows after the compressor, or the ratios.
    """

    def __init__(self, model: Any, index: int, side: int, ratios: ViewRatios | None) -> None:
        self.compressor = model.blocks[index].compressor
        self.ratios, window = ratios, self.compressor.window
        self.grids = model.merged_grids(side)
        self.sides = side * window if ratios is None else ratios
        steps = [(side, None)]  # of each step, the sides in front of it and the views it merges
        if ratios is not None:
            steps = [
                (
                    tuple(window ** min(step, count) for count in ratios.times),
                    tuple(view for view, count in enumerate(ratios.times) if count > step),
                )
                for step in range(max(ratios.times))
            ]
        # Pooling knows no positions.
        early = isinstance(self.compressor, EarlyCompressor)
        rotary = [model.rotary(index, sides, 0, views) if early else None for sides, views in steps]
        self.positions = [() if table is None else (table,) for table in rotary]

    def __call__(self, patches: torch.Tensor) -> tuple[torch.Tensor, PackedGrids]:
        """Merge packed tokens; return them with their grids."""
        if self.ratios is None:
            merged = self.compressor(patches, self.grids, *self.positions[0])
            return merged, self.grids.merged(self.compressor.window)
        positions, window = iter(self.positions), self.compressor.window

        def compress(x: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
            return self.compressor(x, grids, *next(positions))

        ratios = [side**2 for side in self.ratios.sides]
        return merge_by_ratio(compress, patches, self.grids, ratios, window=window)


def token_variance(x: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Score views by how much their tokens differ: the variance over a view, mean over channels.

    Args:
        x: Packed tokens ``(N, C)``, or packed pixels ``(N, 3, p, p)``.
        grids: Their grids, S views.

    Returns:
        ``(S,)``, float32 or float64; 0 for a view without tokens.

    Example:
        >>> x = torch.cat([torch.ones(4, 8), torch.randn(6, 8)])
        >>> (token_variance(x, [(2, 2), (2, 3)]) > 0).tolist()
        [False, True]
    """
    check_tensor(x, "x")
    wide = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    grids = PackedGrids.of(grids)
    locate(wide, "x", grids, 1, ("C",))
    views = wide.split([height * width for height, width in grids])
    scores = [v.var(0, correction=0).mean() if len(v) else v.sum() for v in views]
    return torch.stack(scores) if scores else wide.new_zeros(0)


def choose_ratios(
    scores: Sequence[float] | torch.Tensor,
    grids: Grids,
    max_tokens: int,
    *,
    ratios: Sequence[int] = RATIOS,
    window: int = 2,
) -> list[int]:
    """Choose a ratio for each view so that all together have at most ``max_tokens`` tokens.

    The views with the lowest scores are merged first: all views start at the lowest ratio; then, in
    ascending order of their scores, they go to the next one until the budget is met; then to the
    one after that. Of two equal scores the earlier view goes first.

    Args:
        scores: One number for each view, for example :func:`token_variance`. A tensor on a device
            is read, which waits for it.
        grids: Grids of the views, in tokens.
        max_tokens: The budget, in tokens after merging.
        ratios: Those allowed, ascending powers of ``window²``.
        window: Side of a window.

    Returns:
        A ratio for each view.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Numbers of views differ, a score is NaN, the ratios do not ascend, or the
            highest ratio for every view still exceeds the budget.

    Example:
        >>> choose_ratios([0.1, 5.0, 0.2], [(4, 4)] * 3, max_tokens=24)
        [4, 1, 4]
    """
    max_tokens = check_positive_int(max_tokens, "max_tokens")
    window = check_positive_int(window, "window")
    grids = PackedGrids.of(grids)
    times = times_of(ratios, len(ratios), window)
    if not times or times != sorted(set(times)):
        raise ValueError(f"ratios must ascend, got {list(ratios)}")
    scores = [float(score) for score in scores]
    if len(scores) != len(grids) or any(score != score for score in scores):
        raise ValueError(f"scores must hold {len(grids)} numbers, one for each view, got {scores}")
    levels = [grids.merged(window**count) if count else grids for count in times]
    tokens = [[height * width for height, width in level] for level in levels]
    chosen, total = [0] * len(grids), sum(tokens[0])
    order = sorted(range(len(grids)), key=lambda view: (scores[view], view))
    for level in range(1, len(times)):
        for view in order:
            if total <= max_tokens:
                break
            total -= tokens[level - 1][view] - tokens[level][view]
            chosen[view] = level
    if total > max_tokens:
        raise ValueError(
            f"max_tokens must be at least {total}, what is left with ratio {ratios[-1]} for every "
            f"view, got {max_tokens}"
        )
    return [int(ratios[level]) for level in chosen]


def times_of(ratios: Any, views: int, window: int) -> list[int]:
    """Return how often each view is merged, given its ratio ``window ** (2 * times)``."""
    window = check_positive_int(window, "window")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    if not isinstance(ratios, Sequence) or isinstance(ratios, str):
        raise TypeError(f"ratios must be a sequence of ints, got {type(ratios).__name__}")
    if len(ratios) != views:
        raise ValueError(f"ratios must have one entry for each of {views} views, got {len(ratios)}")
    times = []
    for index, ratio in enumerate(ratios):
        ratio = check_positive_int(ratio, f"ratios[{index}]")
        count = 0
        while window ** (2 * count) < ratio:
            count += 1
        if window ** (2 * count) != ratio:
            raise ValueError(f"ratios[{index}] must be a power of {window**2}, got {ratio}")
        times.append(count)
    return times
