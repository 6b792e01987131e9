# SPDX-License-Identifier: Apache-2.0
"""What ``uhd-ops bench`` runs: every case holds our operator and its rivals on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import uhd_ops

Grid = tuple[int, int]


class Case(NamedTuple):
    """Functions that compute the same thing; ours is called ``uhd_ops``."""

    name: str
    variants: dict[str, Callable[[], object]]


def to_windows(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Bring the tokens of 2x2 windows together: ``(N, ...)`` to ``(M, 4, ...)``, by a copy."""
    height, width = grid
    x = x.reshape(height // 2, 2, width // 2, 2, *x.shape[1:])
    return x.transpose(1, 2).reshape(-1, 4, *x.shape[4:])


def from_windows(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Undo :func:`to_windows`."""
    height, width = grid
    x = x.reshape(height // 2, width // 2, 2, 2, *x.shape[2:])
    return x.transpose(1, 2).reshape(height * width, *x.shape[4:])


def sdpa_on_windows(q, k, v, grid):
    """Attend with torch's own kernel, windows as the batch."""
    q, k, v = (to_windows(x, grid).transpose(1, 2) for x in (q, k, v))
    return from_windows(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), grid)


def einsum_on_windows(q, k, v, grid):
    """Attend with two einsums and a softmax."""
    q, k, v = (to_windows(x, grid) for x in (q, k, v))
    scores = torch.einsum("mihd,mjhd->mhij", q, k) * q.shape[-1] ** -0.5
    return from_windows(torch.einsum("mhij,mjhd->mihd", scores.softmax(-1), v), grid)


def dense_mlp(x, grid, weights, norm_weight, norm_bias):
    """Merge tokens with torch's LayerNorm, linear layers and mean."""
    windows = to_windows(x, grid)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    normed = F.layer_norm(windows.flatten(1), norm_weight.shape, norm_weight, norm_bias, 1e-6)
    hidden = F.gelu(F.linear(normed, fc1_weight, fc1_bias), approximate="tanh")
    return windows.mean(1) + F.linear(hidden, fc2_weight, fc2_bias)


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
            "sdpa, permuted windows": call(sdpa_on_windows, grid),
            "einsum, permuted windows": call(einsum_on_windows, grid),
            "reference": call(uhd_ops.reference.window_attention, [grid]),
        }
        return Case(f"window_attention {str(dtype)[6:]}{direction}", variants)

    return make


def _unshuffle(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
    x = torch.randn(grid[0] * grid[1], dim)
    variants = {
        "uhd_ops": lambda: uhd_ops.pixel_unshuffle(x, [grid]),
        "reshape and permute": lambda: to_windows(x, grid).flatten(1),
        "reference": lambda: uhd_ops.reference.pixel_unshuffle(x, [grid]),
    }
    return Case("pixel_unshuffle float32", variants)


def _mean(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
    x = torch.randn(grid[0] * grid[1], dim)
    height, width = grid
    variants = {
        "uhd_ops": lambda: uhd_ops.window_mean(x, [grid]),
        "reshape and mean": lambda: x.view(height // 2, 2, width // 2, 2, dim).mean((1, 3)),
        "reference": lambda: uhd_ops.reference.window_mean(x, [grid]),
    }
    return Case("window_mean float32", variants)


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

    variants = {
        "uhd_ops": ours(dense),
        "torch layers": lambda: dense_mlp(x, grid, dense, *norm),
        "uhd_ops, tied form": ours(tied),
    }
    return Case("pixel_unshuffle_mlp float32", variants)


CASES = (
    _attention(torch.float32, backward=False),
    _attention(torch.bfloat16, backward=False),
    _attention(torch.float32, backward=True),
    _unshuffle,
    _mean,
    _mlp,
)
"""Functions ``make(grid, dim, heads, mlp_hidden)``, which return a case on random tensors."""
