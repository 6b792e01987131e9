# SPDX-License-Identifier: Apache-2.0
"""What the SPECs of the three operators that repeat a weight have in common."""

from __future__ import annotations

import torch

from uhd_ops.reference._bad_inputs import bad, bad_count, bad_tensor
from uhd_ops.reference._spec import BadInput, Call, random_tensor


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the type that its gradient is added up in: half types in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_matrix(grids, dtype, *, rows=5, cols=7, tiles=4, generator=None) -> Call:
    """A random ``(O, I)`` weight; ``grids`` is there because every ``make`` takes it."""
    weight = random_tensor((rows, cols), dtype, generator)
    return Call((weight,), {"tiles": tiles}, per_token=(), grids=None)


MATRIX_OPTIONS = {"rows": (5, 1, 16), "cols": (7, 1, 16, 100), "tiles": (4, 1, 3, 9)}


def sum_roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward copies. Backward adds the gradients of k tiles: k - 1 additions, each off by half an
    epsilon of at most k times the largest gradient. Gradients are standard normal numbers, so the
    largest sum is not below half the largest gradient (unless there are only a few sums, which then
    have few chances to err).
    """
    return call.kwargs["tiles"] * (call.kwargs["tiles"] - 1)


def bytes_moved(call: Call, copies: int) -> int:
    """Read the weight, write ``copies`` times its size."""
    return (1 + copies) * call.args[0].numel() * call.args[0].element_size()


def bad_inputs(name: str) -> tuple[BadInput, ...]:
    """Calls that an operator on the tensor ``name`` must refuse, whatever its shape."""
    return (*bad_tensor(name), *bad_count("tiles"))


def bad_matrix() -> tuple[BadInput, ...]:
    """Calls that an operator on an ``(O, I)`` weight must refuse."""
    return (
        *bad_inputs("weight"),
        bad(
            "one dimension",
            0,
            lambda weight: weight[0],
            ValueError,
            "weight must be (O, I), got shape (7,)",
        ),
        bad(
            "three dimensions",
            0,
            lambda weight: weight[None],
            ValueError,
            "weight must be (O, I), got shape (1, 5, 7)",
        ),
    )
