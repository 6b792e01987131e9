# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.reorder_tokens`."""

from __future__ import annotations

from specs._bad_inputs import bad_order, bad_tokens
from specs._spec import Call, OpSpec, random_tensor
from uhd_ops import reference


def _make(grids, dtype, *, channels=8, order="block", order_in="raster", generator=None):
    tokens = sum(h * w for h, w in grids)
    x = random_tensor((tokens, channels), dtype, generator)
    return Call((x, grids), {"order": order, "order_in": order_in})


SPEC = OpSpec(
    name="reorder_tokens",
    reference=reference.reorder_tokens,
    make=_make,
    options={
        "order": ("block", "raster", (3, 2), (5, 3, 1)),
        "order_in": ("raster", "block", (3, 2), (1,)),
        "channels": (8, 1, 7),
    },
    bad_inputs=(
        *bad_tokens(),
        *bad_order("order", with_window=False),
        *bad_order("order_in", with_window=False),
    ),
    roundings=lambda call: 0.0,  # every number is copied, forward and backward
    output="tokens",
    exempt={"native": "it is one index_select of torch, forward and backward"},
)
