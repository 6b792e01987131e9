# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.window_attention`."""

from __future__ import annotations

import torch

from uhd_ops.reference._bad_inputs import bad_attention, bad_count
from uhd_ops.reference._spec import BadInput, Call, OpSpec, random_tensor
from uhd_ops.reference._token_order import ORDERS, bad_order, from_raster, to_raster
from uhd_ops.reference._windows import (
    clamped_window,
    packed,
    unpacked,
    window_tokens,
)


def window_attention(q, k, v, grids, window=2, *, scale=None, order="raster", order_in="raster"):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.window_attention`."""
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    q, pairs, batch = packed(q, grids, 2)
    k, v = packed(k, grids, 2)[0], packed(v, grids, 2)[0]
    q, k, v = (to_raster(x, pairs, order_in, window) for x in (q, k, v))
    tokens, present = window_tokens(pairs, clamped_window(pairs, window), q.device)
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)

    # (M, f*f, H, D) -> scores (M, H, f*f, f*f), with slots that hold no token masked as keys. Their
    # values are masked too: a weight of zero does not cancel an infinite value.
    scores = torch.einsum("mihd,mjhd->mhij", q[tokens], k[tokens]) * scale
    scores = scores.masked_fill(~present[:, None, None, :], float("-inf"))
    values = v[tokens].masked_fill(~present[..., None, None], 0)
    result = torch.einsum("mhij,mjhd->mihd", scores.softmax(-1), values)

    window_major = result[present].to(
        dtype
    )  # every token once: windows in order, slots in raster order
    out = torch.empty_like(window_major).index_copy(0, tokens[present], window_major)
    return unpacked(from_raster(out, pairs, order, window), grids, batch)


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


def _bytes_moved(call: Call) -> int:
    return 4 * call.args[0].numel() * call.args[0].element_size()


def _flops(call: Call) -> int:
    _, present = window_tokens(call.args[3], call.kwargs["window"])
    heads, dim = call.args[0].shape[1:]
    return int(4 * (present.sum(1) ** 2).sum()) * heads * dim


SPEC = OpSpec(
    name="window_attention",
    reference=window_attention,
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
    bytes_moved=_bytes_moved,
    flops=_flops,
    output="tokens",
    autocast="cast",
)
