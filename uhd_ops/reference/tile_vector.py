# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.tile_vector`."""

from __future__ import annotations

from uhd_ops.reference import _tiles
from uhd_ops.reference._spec import BadInput, Call, OpSpec, random_tensor


def tile_vector(vector, tiles):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_vector`."""
    return _tiles.wide(vector).repeat(tiles).to(vector.dtype)


def _make(grids, dtype, *, size=7, tiles=4, generator=None):
    vector = random_tensor((size,), dtype, generator)
    return Call((vector,), {"tiles": tiles}, per_token=(), grids=None)


SPEC = OpSpec(
    name="tile_vector",
    reference=tile_vector,
    make=_make,
    options={"size": (7, 1, 16, 100), "tiles": (4, 1, 3, 9)},
    bad_inputs=(
        *_tiles.bad_inputs("vector"),
        BadInput(
            "two dimensions",
            lambda call: call.put(0, call.get(0)[None]),
            ValueError,
            "vector must be (I,), got shape (1, 7)",
        ),
    ),
    roundings=_tiles.sum_roundings,
    bytes_moved=lambda call: _tiles.bytes_moved(call, call.kwargs["tiles"]),
    flops=lambda call: 0,
    output=None,
)
