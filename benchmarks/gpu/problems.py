# SPDX-License-Identifier: Apache-2.0
"""Inputs, our operator, its definition, and the rivals of each case, as functions of one tuple."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import uhd_ops
from gpu import attention_rivals, mlp_rivals
from gpu.cases import ATTENTION, DENSE, MEAN, NORM, POOL, TIED, TILES, UNSHUFFLE, Case
from uhd_ops import reference
from uhd_ops.cli import rivals as eager

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor | Tensors]


@dataclass(frozen=True)
class Rival:
    """One way to do it.

    Attributes:
        name: What tables show.
        make: ``make(case, device)`` returns a function of the case's tensors. A module has
            parameters of its own, which take gradients too.
        compiled: Compiling takes seconds, so it takes part in thorough cases only.
        same_function: Whether it computes what ours does; otherwise it is listed beside the ratio.
        sides: The sides of windows that it is for; None for all.
    """

    name: str
    make: Callable[[Case, torch.device], Function]
    compiled: bool = False
    same_function: bool = True
    sides: tuple[int, ...] | None = None

    def takes_part(self, case: Case) -> bool:
        if self.sides is not None and case.window not in self.sides:
            return False
        return case.thorough or not self.compiled


_compiled = mlp_rivals.compiled
_MLP = (
    Rival("eager", mlp_rivals.mlp),
    Rival("cuBLASLt epilogue", mlp_rivals.mlp_epilogue),
    Rival("compiled", _compiled(mlp_rivals.mlp), compiled=True),
)
RIVALS: dict[str, tuple[Rival, ...]] = {
    ATTENTION: (
        Rival("Triton, hand-written", attention_rivals.handwritten_triton, sides=(2,)),
        Rival("SDPA, permuted windows", attention_rivals.sdpa),
        Rival("varlen attention (FA2)", attention_rivals.varlen),
        Rival("eager matmul", attention_rivals.matmul),
        Rival("compiled broadcast", attention_rivals.compiled_broadcast, compiled=True, sides=(2,)),
        Rival("compiled SDPA", attention_rivals.compiled_sdpa, compiled=True),
        Rival("flex_attention", attention_rivals.flex, compiled=True),
        Rival("SDPA, no permutes", attention_rivals.window_major_sdpa, same_function=False),
    ),
    NORM: (
        Rival("eager", mlp_rivals.norm),
        Rival("compiled", _compiled(mlp_rivals.norm), compiled=True),
    ),
    TIED: _MLP,
    DENSE: (*_MLP, Rival("Qwen2-VL merger", mlp_rivals.merger, same_function=False)),
    UNSHUFFLE: (
        Rival("eager", mlp_rivals.unshuffle),
        Rival("compiled", _compiled(mlp_rivals.unshuffle), compiled=True),
    ),
    MEAN: (
        Rival("eager", mlp_rivals.mean),
        Rival("eager avg_pool2d", mlp_rivals.mean_avg_pool),
        Rival("compiled", _compiled(mlp_rivals.mean), compiled=True),
    ),
    POOL: (
        Rival("eager", mlp_rivals.pool),
        Rival("compiled", _compiled(mlp_rivals.pool), compiled=True),
    ),
    TILES: (
        Rival("eager", mlp_rivals.tiles),
        Rival("compiled", _compiled(mlp_rivals.tiles), compiled=True),
    ),
}


def inputs(case: Case, device: torch.device, seed: int) -> Tensors:
    """Return fresh random inputs of a case; weights are scaled to keep the hidden layer near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    n, c, i = case.tokens, case.channels, case.hidden
    if case.op == ATTENTION:
        return randn(n, 3, case.heads, c // case.heads).unbind(1)
    if case.op == TILES:
        return randn(i, c), randn(c, i)
    x = randn(n, c)
    if case.op in (UNSHUFFLE, MEAN):
        return (x,)
    if case.op == POOL:
        return x, randn(n, c)
    norm = randn(4 * c), randn(4 * c)
    if case.op == NORM:
        # Our kernel takes the norm's weights in float32, torch's takes them in the dtype of x.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (x, *norm, *(vector.to(wide) for vector in norm))
    patches = 4 if case.op == DENSE else 1
    weights = randn(patches * i, patches * c, scale=0.02), randn(patches * i)
    return (x, *weights, randn(c, patches * i, scale=0.02), randn(c), *norm)


def ours(case: Case, device: torch.device) -> Function:
    """Return our operator; everything that is cached per grid is made here, once."""
    grids = uhd_ops.PackedGrids([case.grid])
    if case.op == NORM:
        views, windows = grids.view_table(2, device), grids.num_windows(2)
        kernel = torch.ops.uhd_ops._unshuffle_norm
        return lambda x, w, b, *wide: kernel(x, views, windows, *wide, 1e-6, 2, True)[:2]
    return {
        ATTENTION: lambda q, k, v: uhd_ops.window_attention(q, k, v, grids, case.window),
        UNSHUFFLE: lambda x: uhd_ops.pixel_unshuffle(x, grids),
        MEAN: lambda x: uhd_ops.window_mean(x, grids),
        POOL: lambda x, logits: uhd_ops.window_pool(x, logits, grids),
        TILES: lambda w1, w2: (uhd_ops.tile_block_diagonal(w1, 4), uhd_ops.tile_average(w2, 4)),
        TIED: lambda *tensors: _mlp(uhd_ops.pixel_unshuffle_mlp, grids, *tensors),
        DENSE: lambda *tensors: _mlp(uhd_ops.pixel_unshuffle_mlp, grids, *tensors),
    }[case.op]


def definition(case: Case) -> Function:
    """Return what the results are checked against; called on float64."""
    grids = [case.grid]
    return {
        ATTENTION: lambda q, k, v: reference.window_attention(q, k, v, grids, case.window),
        NORM: lambda x, w, b, *_: eager.unshuffle_norm(x, w, b, case.grid),
        UNSHUFFLE: lambda x: reference.pixel_unshuffle(x, grids),
        MEAN: lambda x: reference.window_mean(x, grids),
        POOL: lambda x, logits: reference.window_pool(x, logits, grids),
        TILES: lambda w1, w2: (reference.tile_block_diagonal(w1, 4), reference.tile_average(w2, 4)),
        TIED: lambda *tensors: _mlp(reference.pixel_unshuffle_mlp, grids, *tensors),
        DENSE: lambda *tensors: _mlp(reference.pixel_unshuffle_mlp, grids, *tensors),
    }[case.op]


def _mlp(function: Function, grids, x, w1, b1, w2, b2, weight, bias) -> torch.Tensor:
    return function(x, grids, w1, b1, w2, b2, norm_weight=weight, norm_bias=bias)
