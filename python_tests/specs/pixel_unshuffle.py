# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.pixel_unshuffle`."""

from __future__ import annotations

from specs._bad_inputs import bad_count, bad_order, bad_tokens
from specs._spec import ORDERS, Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(grids, dtype, *, channels=8, factor=2, order_in="raster", generator=None):
    tokens = sum(h * w for h, w in grids)
    x = random_tensor((tokens, channels), dtype, generator)
    return Call((x, grids), {"factor": factor, "order_in": order_in})


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward copies. Backward adds the gradients of at most k = factor**2 slots: k - 1 additions,
    each off by half an epsilon of at most k times the largest gradient. Gradients are standard
    normal numbers, so the largest sum is not below half the largest gradient (unless there are only
    a few sums, which then have few chances to err).
    """
    slots = call.kwargs["factor"] ** 2
    return slots * (slots - 1)


SPEC = OpSpec(
    name="pixel_unshuffle",
    reference=reference.pixel_unshuffle,
    make=_make,
    options={"channels": (8, 1, 7, 72, 100), "factor": (2, 1, 3, 5), "order_in": ORDERS},
    bad_inputs=(*bad_tokens(), *bad_count("factor"), *bad_order("order_in")),
    roundings=_roundings,
    output="windows",
)
