# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.window_mean`."""

from __future__ import annotations

from specs._bad_inputs import bad_count, bad_order, bad_tokens
from specs._spec import ORDERS, Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(grids, dtype, *, channels=8, window=2, order_in="raster", generator=None):
    tokens = sum(h * w for h, w in grids)
    x = random_tensor((tokens, channels), dtype, generator)
    return Call((x, grids), {"window": window, "order_in": order_in})


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward adds k = window**2 tokens: k - 1 additions, each off by half an epsilon of at most k
    times the largest token, and divides by k, another half epsilon; for standard normal tokens the
    largest mean is about 1 / sqrt(k) of the largest token, and half of that is allowed for: (k - 1)
    sqrt(k) + 1 / 2 < k ** 1.5. Backward divides once.
    """
    tokens = call.kwargs["window"] ** 2
    return tokens**1.5


SPEC = OpSpec(
    name="window_mean",
    reference=reference.window_mean,
    make=_make,
    options={"channels": (8, 1, 7, 72, 100), "window": (2, 1, 3, 5), "order_in": ORDERS},
    bad_inputs=(*bad_tokens(), *bad_count("window"), *bad_order("order_in")),
    roundings=_roundings,
    output="windows",
)
