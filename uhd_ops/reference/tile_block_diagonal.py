# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.tile_block_diagonal`."""

from __future__ import annotations

import torch

from uhd_ops.reference import _tiles
from uhd_ops.reference._spec import OpSpec


def tile_block_diagonal(weight, tiles):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_block_diagonal`."""
    blocks = _tiles.wide(weight).expand(tiles, *weight.shape)
    return torch.block_diag(*blocks).to(weight.dtype)


SPEC = OpSpec(
    name="tile_block_diagonal",
    reference=tile_block_diagonal,
    make=_tiles.make_matrix,
    options=_tiles.MATRIX_OPTIONS,
    bad_inputs=_tiles.bad_matrix(),
    roundings=_tiles.sum_roundings,
    bytes_moved=lambda call: _tiles.bytes_moved(call, call.kwargs["tiles"] ** 2),
    flops=lambda call: 0,
    output=None,
)
