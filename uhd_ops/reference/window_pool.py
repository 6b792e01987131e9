# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.window_pool`."""

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


def window_pool(
    x: torch.Tensor,
    logits: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    order_in: TokenOrder = "raster",
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.window_pool`."""
    x, pairs, batch = packed(x, grids, 1)
    logits = packed(logits, grids, 1)[0]
    x, logits = (to_raster(tensor, pairs, order_in, window) for tensor in (x, logits))
    tokens, present = window_tokens(pairs, clamped_window(pairs, window), x.device)
    absent, wide = ~present[..., None], torch.promote_types(x.dtype, torch.float32)

    # (M, f*f, C). A weight of zero does not cancel an infinite value, so both are masked.
    weights = logits[tokens].to(wide).masked_fill(absent, float("-inf")).softmax(1)
    slots = x[tokens].to(wide).masked_fill(absent, 0)
    return unpacked((weights * slots).sum(1).to(x.dtype), grids, batch, window)
