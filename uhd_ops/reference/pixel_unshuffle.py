# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.pixel_unshuffle`."""

from __future__ import annotations

import torch

from uhd_ops.reference._token_order import TokenOrder, to_raster
from uhd_ops.reference._windows import Grids, packed, unpacked, window_tokens


def pixel_unshuffle(
    x: torch.Tensor, grids: Grids, factor: int = 2, *, order_in: TokenOrder = "raster"
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.pixel_unshuffle`."""
    dtype = x.dtype
    x, pairs, batch = packed(x, grids, 1)
    x = to_raster(x, pairs, order_in, factor)
    tokens, _ = window_tokens(pairs, factor, x.device)  # (M, f*f), missing ones repeat the nearest
    # Autograd adds up the gradients of a repeated token in the dtype of what is indexed here.
    wide = x.to(torch.promote_types(dtype, torch.float32))
    return unpacked(wide[tokens].flatten(1).to(dtype), grids, batch, factor)
