# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.tile_average`."""

from __future__ import annotations

from uhd_ops.reference import _tiles
from uhd_ops.reference._spec import Call, OpSpec


def tile_average(weight, tiles):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_average`."""
    return (_tiles.wide(weight).repeat(1, tiles) / tiles).to(weight.dtype)


def _roundings(call: Call) -> float:
    """Count the roundings: those of the sum over the tiles, and one of the division."""
    return _tiles.sum_roundings(call) + 1


SPEC = OpSpec(
    name="tile_average",
    reference=tile_average,
    make=_tiles.make_matrix,
    options=_tiles.MATRIX_OPTIONS,
    bad_inputs=_tiles.bad_matrix(),
    roundings=_roundings,
    bytes_moved=lambda call: _tiles.bytes_moved(call, call.kwargs["tiles"]),
    flops=lambda call: call.args[0].numel(),  # each element is divided once, then copied
    output=None,
)
