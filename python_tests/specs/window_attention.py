# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.window_attention`."""

from __future__ import annotations

from specs._bad_inputs import bad_attention, bad_count, bad_order
from specs._spec import ORDERS, BadInput, Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(
    grids,
    dtype,
    *,
    heads=2,
    head_dim=8,
    window=2,
    order="raster",
    order_in="raster",
    generator=None,
):
    tokens = sum(h * w for h, w in grids)
    q, k, v = (random_tensor((tokens, heads, head_dim), dtype, generator) for _ in range(3))
    return Call(
        (q, k, v, grids),
        {"window": window, "order": order, "order_in": order_in},
        differentiable=(0, 1, 2),
        per_token=(0, 1, 2),
        grids=3,
    )


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    A score is a sum of D products: at most D + 1 roundings relative to sum |q k|, which for
    standard normal numbers is about D, times scale = D ** -0.5; it is the exponent of the softmax,
    so an absolute error of (D + 1) sqrt(D) eps in it is a relative error of the probability.
    Exponential, normalisation and the mixture of T = window**2 rows add T + 4 more. The backward
    pass forms two such products and mixes twice, hence the factor 2.
    """
    dim, tokens = call.args[0].shape[-1], call.kwargs["window"] ** 2
    return 2 * ((dim + 1) * dim**0.5 + tokens + 4)


SPEC = OpSpec(
    name="window_attention",
    reference=reference.window_attention,
    make=_make,
    options={
        "head_dim": (8, 1, 7, 64, 72, 80),
        "heads": (2, 1, 3),
        "window": (2, 1, 3, 5),
        "order": ("raster", "window", (3, 2)),
        "order_in": ORDERS,
    },
    bad_inputs=(
        *bad_attention(),
        *bad_count("window"),
        *bad_order("order"),
        *bad_order("order_in"),
        BadInput(
            "scale",
            lambda call: Call(call.args, {**call.kwargs, "scale": float("nan")}),
            ValueError,
            "scale must be finite, got nan",
        ),
    ),
    roundings=_roundings,
    output="tokens",
    autocast="cast",
)
