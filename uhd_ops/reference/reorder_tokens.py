# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.reorder_tokens`."""

from __future__ import annotations

from uhd_ops.reference._token_order import from_raster, to_raster
from uhd_ops.reference._windows import packed, unpacked


def reorder_tokens(x, grids, order="raster", *, order_in="raster"):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.reorder_tokens`."""
    x, pairs, batch = packed(x, grids, 1)
    return unpacked(from_raster(to_raster(x, pairs, order_in), pairs, order), grids, batch)
