# SPDX-License-Identifier: Apache-2.0
"""What ``uhd-ops bench`` runs: every case holds our operator and its rivals on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import uhd_ops
from uhd_ops.cli import rivals

Grid = tuple[int, int]


class Case(NamedTuple):
    """Functions that compute the same thing; ours is called ``uhd_ops``."""

    name: str
    variants: dict[str, Callable[[], object]]


def _attention(dtype: torch.dtype, backward: bool) -> Callable[..., Case]:
    def make(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
        tokens = grid[0] * grid[1]
        qkv = torch.randn(tokens, 3, heads, dim // heads, dtype=dtype, requires_grad=backward)
        grad = torch.randn(tokens, heads, dim // heads, dtype=dtype)

        def call(function: Callable[..., torch.Tensor], grids: object) -> Callable[[], object]:
            if not backward:
                return lambda: function(*qkv.unbind(1), grids)
            return lambda: torch.autograd.grad(function(*qkv.unbind(1), grids), qkv, grad)[0]

        direction = ", with backward" if backward else ""
        variants = {
            "uhd_ops": call(uhd_ops.window_attention, [grid]),
            **{name: call(f, grid) for name, f in rivals.eager("window_attention").items()},
            "reference": call(uhd_ops.reference.window_attention, [grid]),
        }
        return Case(f"window_attention {str(dtype)[6:]}{direction}", variants)

    return make


def _row_per_window(op: str) -> Callable[..., Case]:
    def make(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
        x = torch.randn(grid[0] * grid[1], dim)
        variants = {
            "uhd_ops": lambda: getattr(uhd_ops, op)(x, [grid]),
            **{name: lambda f=f: f(x, grid) for name, f in rivals.eager(op).items()},
            "reference": lambda: getattr(uhd_ops.reference, op)(x, [grid]),
        }
        return Case(f"{op} float32", variants)

    return make


def _mlp(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
    x = torch.randn(grid[0] * grid[1], dim)
    norm = torch.ones(4 * dim), torch.zeros(4 * dim)
    tied = torch.randn(mlp_hidden, dim) * 0.02, torch.zeros(mlp_hidden)
    tied += torch.randn(dim, mlp_hidden) * 0.02, torch.zeros(dim)
    dense = (
        uhd_ops.tile_block_diagonal(tied[0], 4),
        uhd_ops.tile_vector(tied[1], 4),
        uhd_ops.tile_average(tied[2], 4),
        tied[3],
    )

    def ours(weights: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: uhd_ops.pixel_unshuffle_mlp(
            x, [grid], *weights, norm_weight=norm[0], norm_bias=norm[1]
        )

    variants = {"uhd_ops": ours(dense), "uhd_ops, tied form": ours(tied)}
    for form, weights in {"dense": dense, "tied": tied}.items():
        for name, rival in rivals.eager(f"pixel_unshuffle_mlp {form}").items():
            variants[f"{name}, {form} form"] = lambda f=rival, w=weights: f(x, *w, *norm, grid)
    return Case("pixel_unshuffle_mlp float32", variants)


CASES = (
    _attention(torch.float32, backward=False),
    _attention(torch.bfloat16, backward=False),
    _attention(torch.float32, backward=True),
    _row_per_window("pixel_unshuffle"),
    _row_per_window("window_mean"),
    _mlp,
)
"""Functions ``make(grid, dim, heads, mlp_hidden)``, which return a case on random tensors."""
