# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.window_attention`."""

from __future__ import annotations

import torch

from specs._bad_inputs import (
    bad,
    bad_attention,
    bad_count,
    bad_order,
    bad_tensor,
    too_many_tokens,
)
from specs._spec import ORDERS, BadInput, Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(
    grids,
    dtype,
    *,
    heads=2,
    kv_heads=None,
    head_dim=8,
    window=2,
    order="raster",
    order_in="raster",
    generator=None,
):
    tokens = sum(h * w for h, w in grids)
    counts = (heads, kv_heads or heads, kv_heads or heads)
    q, k, v = (random_tensor((tokens, count, head_dim), dtype, generator) for count in counts)
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
    pass forms two such products and mixes twice, hence the factor 2. A gradient of a key adds up
    the tokens of all heads that share it, of which there are at most H.
    """
    heads = call.kwargs.get("num_heads") or call.args[0].shape[-2]
    dim, tokens = call.args[0].shape[-1], call.kwargs["window"] ** 2
    return 2 * ((dim + 1) * dim**0.5 + heads * tokens + 4)


_DIVISOR = "k must have the shape of q, (39, 2, 8), or with a divisor of its heads"

SPEC = OpSpec(
    name="window_attention",
    reference=reference.window_attention,
    make=_make,
    options={
        "head_dim": (8, 1, 7, 64, 72, 80),
        "heads": (2, 1, 3),
        "kv_heads": (None, 1),
        "window": (2, 1, 3, 5),
        "order": ("raster", "window", (3, 2)),
        "order_in": ORDERS,
    },
    bad_inputs=(
        *bad_attention(like="k"),
        *bad(
            {
                f"{_DIVISOR}, got (39, 3, 8)": (1, lambda k: torch.cat([k, k[:, :1]], 1)),
                f"{_DIVISOR}, got (39, 0, 8)": (1, lambda k: k[:, :0]),
                f"{_DIVISOR}, got (39, 1, 7)": (1, lambda k: k[:, :1, 1:]),
            }
        ),
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


def _make_packed(grids, dtype, *, kv_heads=None, heads=2, generator=None, **options):
    call = _make(grids, dtype, kv_heads=kv_heads, heads=heads, generator=generator, **options)
    qkv = torch.cat(call.args[:3], 1) if kv_heads else torch.stack(call.args[:3], 1)
    kwargs = {**call.kwargs, "num_heads": heads if kv_heads else None}
    return Call((qkv, call.args[3]), kwargs)


_SCALE = SPEC.bad_inputs[-1]
_FORM = "qkv must be (N, 3, H, D), or (B, h*w, 3, H, D) with one (h, w) grid, got shape (39, 3)"
_THREE = "qkv must be (..., 3, H, D) where num_heads is None, got shape (39, 2, 2, 8)"
_HEADS = "qkv must have num_heads + 2 * H_kv heads, where H_kv divides num_heads = 4"


def _grouped(heads):
    """Change a good call to one with ``(N, heads, D)``, of which 4 are those of queries."""
    return lambda call: Call((call.args[0].new_zeros(39, heads, 8), call.args[1]), {"num_heads": 4})


PACKED = OpSpec(
    name="window_attention_qkvpacked",
    reference=reference.window_attention_qkvpacked,
    make=_make_packed,
    options={
        "head_dim": (8, 7, 72),
        "heads": (2, 3),
        "kv_heads": (None, 1),
        "window": (2, 3),
        "order": ("raster", "window"),
        "order_in": ORDERS,
    },
    bad_inputs=(
        *bad_tensor("qkv"),
        *bad({_FORM: (0, lambda qkv: qkv[..., 0, 0]), _THREE: (0, lambda qkv: qkv[:, :2])}),
        *too_many_tokens("qkv", 1, "N, 3, H, D", "(39, 3, 2, 8)"),
        *(
            BadInput(
                f"{heads} heads",
                _grouped(heads),
                ValueError,
                f"{_HEADS}, got shape (39, {heads}, 8)",
            )
            for heads in (4, 7, 10)
        ),
        *bad_count("num_heads"),
        *bad_count("window"),
        *bad_order("order"),
        *bad_order("order_in"),
        _SCALE,
    ),
    roundings=_roundings,
    output="tokens",
    autocast="cast",
)
