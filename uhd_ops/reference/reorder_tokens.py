# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.reorder_tokens`."""

from __future__ import annotations

import torch

from uhd_ops.reference._token_order import TokenOrder, from_raster, to_raster
from uhd_ops.reference._windows import Grids, packed, unpacked


def reorder_tokens(
    x: torch.Tensor, grids: Grids, order: TokenOrder = "raster", *, order_in: TokenOrder = "raster"
) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.reorder_tokens`."""
    x, pairs, batch = packed(x, grids, 1)
    return unpacked(from_raster(to_raster(x, pairs, order_in), pairs, order), grids, batch)
