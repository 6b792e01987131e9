# SPDX-License-Identifier: Apache-2.0
"""The SPECs of the three operators that repeat a weight."""

from __future__ import annotations

from specs._bad_inputs import bad, bad_count, bad_tensor
from specs._spec import Call, OpSpec, random_tensor
from uhd_ops import reference


def _make_matrix(grids, dtype, *, rows=5, cols=7, tiles=4, generator=None) -> Call:
    """A random ``(O, I)`` weight; ``grids`` is there because every ``make`` takes it."""
    weight = random_tensor((rows, cols), dtype, generator)
    return Call((weight,), {"tiles": tiles}, per_token=(), grids=None)


def _make_vector(grids, dtype, *, size=7, tiles=4, generator=None) -> Call:
    vector = random_tensor((size,), dtype, generator)
    return Call((vector,), {"tiles": tiles}, per_token=(), grids=None)


def _sum_roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward copies. Backward adds the gradients of k tiles: k - 1 additions, each off by half an
    epsilon of at most k times the largest gradient. Gradients are standard normal numbers, so the
    largest sum is not below half the largest gradient (unless there are only a few sums, which then
    have few chances to err).
    """
    return call.kwargs["tiles"] * (call.kwargs["tiles"] - 1)


def _mean_roundings(call: Call) -> float:
    """Count the roundings: those of the sum over the tiles, and one of the division."""
    return _sum_roundings(call) + 1


_MATRIX_OPTIONS = {"rows": (5, 1, 16), "cols": (7, 1, 16, 100), "tiles": (4, 1, 3, 9)}
_BAD_MATRICES = (
    *bad_tensor("weight"),
    *bad_count("tiles"),
    *bad({"weight must be (O, I), got shape (7,)": (0, lambda weight: weight[0])}),
    *bad({"weight must be (O, I), got shape (1, 5, 7)": (0, lambda weight: weight[None])}),
)
_BAD_VECTORS = (
    *bad_tensor("vector"),
    *bad_count("tiles"),
    *bad({"vector must be (I,), got shape (1, 7)": (0, lambda vector: vector[None])}),
)

BLOCK_DIAGONAL = OpSpec(
    name="tile_block_diagonal",
    reference=reference.tile_block_diagonal,
    make=_make_matrix,
    options=_MATRIX_OPTIONS,
    bad_inputs=_BAD_MATRICES,
    roundings=_sum_roundings,
    output=None,
)

AVERAGE = OpSpec(
    name="tile_average",
    reference=reference.tile_average,
    make=_make_matrix,
    options=_MATRIX_OPTIONS,
    bad_inputs=_BAD_MATRICES,
    roundings=_mean_roundings,
    output=None,
)

VECTOR = OpSpec(
    name="tile_vector",
    reference=reference.tile_vector,
    make=_make_vector,
    options={"size": (7, 1, 16, 100), "tiles": (4, 1, 3, 9)},
    bad_inputs=_BAD_VECTORS,
    roundings=_sum_roundings,
    output=None,
)
