# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.window_pool`."""

from __future__ import annotations

import torch

from specs._bad_inputs import bad, bad_count, bad_order, bad_tokens
from specs._spec import ORDERS, Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(grids, dtype, *, channels=8, window=2, order_in="raster", generator=None):
    tokens = sum(h * w for h, w in grids)
    x, logits = (random_tensor((tokens, channels), dtype, generator) for _ in range(2))
    return Call(
        (x, logits, grids),
        {"window": window, "order_in": order_in},
        differentiable=(0, 1),
        per_token=(0, 1),
        grids=2,
    )


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    A weight is e^-z with z >= 0, the distance to the largest logit. z is off by half an epsilon of
    z, and by as much again where the exponential is a power of two; z e^-z < 1 / 2, so this is at
    most half an epsilon of the largest weight. The exponential itself is good to 2 epsilons, sum
    and quotient of k = window**2 weights to (k + 1) / 2: a normalised weight is off by k / 2 + 3.
    Pooling multiplies and adds k tokens, another k / 2 + 1 of the largest token, so its result is
    off by less than k + 5 epsilons of the largest token. The gradient of a logit is grad * weight *
    (token - pooled): the roundings of a weight, of a pooled token, and 2 more; below 2 k + 8.

    For standard normal tokens the largest result is about 1 / sqrt(k) of the largest token, and
    half of that is allowed for.
    """
    tokens = call.kwargs["window"] ** 2
    return (2 * tokens + 8) * 2 * tokens**0.5


_OTHER_DTYPE = {
    "logits must have the dtype of x, torch.float32, got torch.float64": (1, torch.Tensor.double)
}
SPEC = OpSpec(
    name="window_pool",
    reference=reference.window_pool,
    make=_make,
    options={"channels": (8, 1, 7, 72, 100), "window": (2, 1, 3, 5), "order_in": ORDERS},
    bad_inputs=(
        *bad_tokens(grids=2),
        *bad(_OTHER_DTYPE, TypeError),
        *bad({"logits must have the shape of x, (39, 8), got (39, 1)": (1, lambda y: y[:, :1])}),
        *bad_count("window"),
        *bad_order("order_in"),
    ),
    roundings=_roundings,
    output="windows",
)
