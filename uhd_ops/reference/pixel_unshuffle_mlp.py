# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.pixel_unshuffle_mlp`."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from uhd_ops.reference._token_order import TokenOrder, to_raster
from uhd_ops.reference._windows import Grids, packed, unpacked, window_tokens

ACTIVATIONS = {
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "gelu": functional.gelu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "silu": functional.silu,
    "relu": functional.relu,
}


def pixel_unshuffle_mlp(
    x: torch.Tensor,
    grids: Grids,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    factor: int = 2,
    activation: Literal["gelu_tanh", "gelu", "quick_gelu", "silu", "relu"] = "gelu_tanh",
    residual: bool = True,
    order_in: TokenOrder = "raster",
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.pixel_unshuffle_mlp`."""
    x, pairs, batch = packed(x, grids, 1)
    x = to_raster(x, pairs, order_in, factor)
    tokens, present = window_tokens(pairs, factor, x.device)
    patches = x[tokens]  # (M, f², C); slots without a token repeat the nearest present one

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if v is None else v.to(wide) for v in (norm_weight, norm_bias))
    z = patches.flatten(1).to(wide)
    z = functional.layer_norm(z, z.shape[1:], weight, bias, eps).to(x.dtype).view_as(patches)

    act = ACTIVATIONS[activation]
    if fc1_weight.dim() == 3:  # block: patch p goes through its own blocks p
        # (f², M, C) -> (f², M, I) -> (f², M, C) -> sum over the patches
        u = z.transpose(0, 1) @ fc1_weight.mT
        u = u if fc1_bias is None else u + fc1_bias.to(u.dtype)[:, None]
        y = (act(u) @ fc2_weight.mT).sum(0)
    elif fc1_weight.shape[1] == factor**2 * x.shape[1]:  # dense
        hidden = act(functional.linear(z.flatten(1), fc1_weight, fc1_bias))
        y = functional.linear(hidden, fc2_weight)
    else:  # tied
        hidden = act(functional.linear(z, fc1_weight, fc1_bias))  # (M, f², I)
        y = functional.linear(hidden.mean(1), fc2_weight)
    if fc2_bias is not None:
        y = y + fc2_bias.to(y.dtype)
    if residual:
        total = patches.to(wide).masked_fill(~present[..., None], 0).sum(1)
        y = y.to(x.dtype) + (total / present.sum(1, keepdim=True)).to(x.dtype)
    return unpacked(y, grids, batch, factor)
