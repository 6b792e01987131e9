# SPDX-License-Identifier: Apache-2.0
"""``pack_batches``: many images in few batches under a budget of tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from uhd_ops._checks import check_int
from uhd_ops.slicing.plan import SlicePlan


def pack_batches(plans: Sequence[SlicePlan | int], max_tokens: int) -> list[list[int]]:
    """Group images into batches of at most ``max_tokens`` packed tokens each.

    Best fit, largest image first: an image goes into the batch that it fills up best, or opens a
    new one. That needs at most 11/9 of the smallest possible number of batches, and one more. The
    result depends on the numbers of tokens only. A batch of packed views costs what its tokens
    cost, with no padding, so this is all the batching that a packed encoder needs.

    Args:
        plans: A plan, or the number of tokens, of each image.
        max_tokens: Most tokens in a batch, before any compression.

    Returns:
        Batches of indices into ``plans``, every index once; ascending inside a batch, and batches
        ordered by their first index.

    Raises:
        TypeError: If ``plans`` is not a sequence of plans and integers, or ``max_tokens`` not an
            integer.
        ValueError: If a number is not positive, or an image alone has more than ``max_tokens``.

    Example:
        >>> plans = [plan_slices(width, 1080) for width in (1920, 448, 800, 640)]
        >>> [plan.num_tokens for plan in plans]
        [9248, 2976, 7152, 4800]
        >>> pack_batches(plans, max_tokens=14000)
        [[0, 1], [2, 3]]
    """
    max_tokens = check_int(max_tokens, "max_tokens", 1, 2**63 - 1)
    if isinstance(plans, (str, bytes)) or not isinstance(plans, Sequence):
        raise TypeError(f"plans must be a sequence of SlicePlans, got {type(plans).__name__}")
    tokens = [_tokens(plan, index) for index, plan in enumerate(plans)]
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens still free and number of the batch, ascending
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        size = tokens[index]
        if size > max_tokens:
            raise ValueError(
                f"max_tokens must be at least {size}, the tokens of plans[{index}], got "
                f"{max_tokens}"
            )
        best = bisect.bisect_left(room, (size, -1))
        if best == len(room):
            free, number = max_tokens, len(batches)
            batches.append([])
        else:
            free, number = room.pop(best)
        batches[number].append(index)
        bisect.insort(room, (free - size, number))
    return sorted(sorted(batch) for batch in batches)


def _tokens(plan: Any, index: int) -> int:
    if isinstance(plan, SlicePlan):
        return plan.num_tokens
    return check_int(plan, f"plans[{index}]", 1, 2**63 - 1)
