# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.window_mean`."""

from __future__ import annotations

import torch

from uhd_ops.reference._token_order import TokenOrder, to_raster
from uhd_ops.reference._windows import (
    Grids,
    clamped_window,
    packed,
    unpacked,
    window_tokens,
)


def window_mean(
    x: torch.Tensor, grids: Grids, window: int = 2, *, order_in: TokenOrder = "raster"
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.window_mean`."""
    x, pairs, batch = packed(x, grids, 1)
    x = to_raster(x, pairs, order_in, window)
    tokens, present = window_tokens(pairs, clamped_window(pairs, window), x.device)
    slots = x[tokens].masked_fill(~present[..., None], 0)  # (M, f*f, C)
    total = slots.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = total / present.sum(1, keepdim=True)
    return unpacked(mean.to(x.dtype), grids, batch, window)
