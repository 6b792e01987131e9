# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.window_attention`."""

from __future__ import annotations

import torch

from uhd_ops.reference._token_order import TokenOrder, from_raster, to_raster
from uhd_ops.reference._windows import (
    Grids,
    clamped_window,
    packed,
    unpacked,
    window_tokens,
)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    scale: float | None = None,
    order: TokenOrder = "raster",
    order_in: TokenOrder = "raster",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotate_half: int = 1,
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.window_attention`."""
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    if rotary is not None:
        q, k = (rotate(x, *rotary, rotate_half) for x in (q, k))
    q, pairs, batch = packed(q, grids, 2)
    k, v = packed(k, grids, 2)[0], packed(v, grids, 2)[0]
    q, k, v = (to_raster(x, pairs, order_in, window) for x in (q, k, v))
    tokens, present = window_tokens(pairs, clamped_window(pairs, window), q.device)
    dtype, wide = v.dtype, _wide(v)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

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


def window_attention_qkvpacked(
    qkv: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    order: TokenOrder = "raster",
    order_in: TokenOrder = "raster",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotate_half: int = 1,
) -> torch.Tensor:
    """Plain PyTorch; arguments as :func:`uhd_ops.window_attention_qkvpacked`."""
    if num_heads is None:
        q, k, v = qkv.unbind(-3)
    else:
        others = (qkv.shape[-2] - num_heads) // 2
        q, k, v = qkv.split([num_heads, others, others], -2)
    return window_attention(
        q,
        k,
        v,
        grids,
        window,
        scale=scale,
        order=order,
        order_in=order_in,
        rotary=rotary,
        rotate_half=rotate_half,
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate_half: int) -> torch.Tensor:
    """Rotary embedding of ``x (..., N, H, D)``, in float32, or float64 where x is.

    Args:
        x: Queries or keys.
        cos: Cosines ``(N, D)``, or broadcast against x.
        sin: Sines, likewise.
        rotate_half: As for :func:`uhd_ops.window_attention`.
    """
    cos, sin = (
        (table[..., None, :] if table.dim() == 2 else table).to(_wide(x)) for table in (cos, sin)
    )
    x = x.to(_wide(x))
    if rotate_half:
        first, second = x.unflatten(-1, (int(rotate_half), 2, -1)).unbind(-2)
        other = torch.stack([-second, first], -2).flatten(-3)
    else:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + other * sin


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
