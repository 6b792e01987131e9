# SPDX-License-Identifier: Apache-2.0
"""What is measured, on a CPU and on a GPU: our operators on random tensors, and their rivals."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import uhd_ops
from uhd_ops import reference
from uhd_ops.cli import rivals

ATTENTION, NORM, TILES = "window_attention", "gather + LayerNorm + mean", "tile_weight"
TIED, DENSE = "pixel_unshuffle_mlp tied", "pixel_unshuffle_mlp dense"
SMALL = ("pixel_unshuffle", "window_mean", "window_pool", TILES)
PRODUCTS = {TIED: 2.5, DENSE: 10}  # operations per token, channel and hidden channel
# This only has to tell a right result from a wrong one: half-precision rivals round at every step.
SANE = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-4, "float64": 1e-9}


@dataclass(frozen=True)
class Case:
    """One operator on one grid, forward, or forward and backward.

    The sizes are those of SigLIP-so400m; 70 x 70 tokens are one view of 980 px.
    """

    op: str
    backward: bool = False
    dtype: str = "float32"
    grid: tuple[int, int] = (70, 70)
    window: int = 2
    channels: int = 1152
    heads: int = 16
    hidden: int = 4304

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def title(self) -> str:
        side = f" {self.window}x{self.window}" if self.op == ATTENTION else ""
        return f"{self.op}{side} forward{' + backward' if self.backward else ''}"

    @property
    def flops(self) -> float:
        """Operations of the matrix products, where they are what takes the time; else 0."""
        once = PRODUCTS.get(self.op, 0) * self.tokens * self.channels * self.hidden
        return once * (3 if self.backward else 1)


def operator(
    case: Case, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], Callable, Callable]:
    """Return random tensors, our operator and its definition; both are functions of them."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    grids, (n, c, i) = uhd_ops.PackedGrids([case.grid]), (case.tokens, case.channels, case.hidden)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def attention(module, qkv):
        return module.window_attention_qkvpacked(qkv, grids, case.window)

    def norm(module, x, *vectors):
        if module is reference:
            return rivals.unshuffle_norm(x, *vectors, case.grid)
        views, windows = grids.view_table(2, x.device), grids.num_windows(2)
        wide = [vector.to(torch.promote_types(dtype, torch.float32)) for vector in vectors]
        return torch.ops.uhd_ops._unshuffle_norm(x, views, windows, *wide, 1e-6, 2, True)[:2]

    def mlp(module, x, *parameters):
        *layers, weight, bias = parameters
        return module.pixel_unshuffle_mlp(x, grids, *layers, norm_weight=weight, norm_bias=bias)

    def tiles(module, w1, w2):
        return module.tile_block_diagonal(w1, 4), module.tile_average(w2, 4)

    def row_per_window(module, *tensors):
        return getattr(module, case.op)(*tensors, grids)

    if case.op == ATTENTION:  # of one packed projection, as a ViT has it
        tensors, function = (randn(n, 3, case.heads, c // case.heads),), attention
    elif case.op == TILES:
        tensors, function = (randn(i, c), randn(c, i)), tiles
    elif case.op == NORM:
        tensors, function = (randn(n, c), randn(4 * c), randn(4 * c)), norm
    elif case.op in (TIED, DENSE):
        inner, outer = (4 * i, 4 * c) if case.op == DENSE else (i, c)
        layers = randn(inner, outer, scale=0.02), randn(inner), randn(c, inner, scale=0.02)
        tensors, function = (randn(n, c), *layers, randn(c), randn(4 * c), randn(4 * c)), mlp
    else:
        tensors = tuple(randn(n, c) for _ in range(2 if case.op == "window_pool" else 1))
        function = row_per_window
    ours, definition = (functools.partial(function, module) for module in (uhd_ops, reference))
    return tensors, ours, definition


def call_of(case: Case, function: Callable, tensors) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return what is timed: the forward pass, or the gradients of forward and backward."""

    def forward(*arguments):
        result = function(*arguments)
        return result if isinstance(result, tuple) else (result,)

    if not case.backward:
        return lambda: torch.no_grad()(forward)(*tensors)
    leaves, grads = [x.detach().requires_grad_() for x in tensors], []
    for y in forward(*leaves):
        # The same numbers for every implementation, and, rounded first, for the definition.
        generator = torch.Generator(y.device).manual_seed(1 + len(grads))
        grad = torch.randn(y.shape, generator=generator, device=y.device)
        grads.append(grad.to(getattr(torch, case.dtype)).to(y.dtype))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grads)


def expected_of(case: Case, definition: Callable, tensors) -> tuple[torch.Tensor, ...]:
    """Return the results of the definition in float64, on the rounded inputs."""
    return call_of(case, definition, [x.double() for x in tensors])()


def check(results, expected, dtype: str) -> float:
    """Return the largest relative error in the Euclidean norm.

    Raises:
        ValueError: It is too large for a time to mean anything, or something is not a number.
    """
    errors = [
        float((result.detach().double() - wanted).norm() / wanted.norm())
        for result, wanted in zip(results, expected, strict=True)
    ]
    if not all(error <= SANE[dtype] for error in errors):
        raise ValueError(f"wrong: relative errors {errors}, at most {SANE[dtype]} is sane")
    return max(errors)


def bytes_moved(case: Case, function: Callable, tensors) -> int:
    """Each input is read once, each output written once; then the same for their gradients."""
    outputs = call_of(replace(case, backward=False), function, tensors)()
    inputs = sum(x.numel() for x in tensors)
    once = inputs + sum(y.numel() for y in outputs)
    again = inputs if case.op in (ATTENTION, NORM, "window_pool") else 0
    return tensors[0].element_size() * (2 * once + again if case.backward else once)


# ---- rivals, beside those of uhd_ops/cli/rivals.py


def on_segments(case: Case, attend: Callable) -> Callable:
    """Bring windows together, ``attend`` on ``(N, H, D)``, and put the result back in raster."""

    def run(qkv):
        parts = rivals.split(qkv, case.grid, case.window).flatten(0, 1)
        windows = attend(*parts.unbind(1)).unflatten(0, (-1, case.window**2))
        return rivals.join(windows, case.grid, case.window)

    return run


def varlen(case: Case, device: torch.device) -> Callable:
    """Attend with torch's variable-length kernel (FlashAttention 2), each window a segment."""
    attend, slots = importlib.import_module("torch.nn.attention.varlen").varlen_attn, case.window**2
    starts = torch.arange(0, case.tokens + 1, slots, dtype=torch.int32, device=device)
    return on_segments(case, lambda q, k, v: attend(q, k, v, starts, starts, slots, slots))


def flex(case: Case, device: torch.device) -> Callable:
    """flex_attention on window-major tokens under a block mask of the windows."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    slots, sizes = case.window**2, (None, None, case.tokens, case.tokens)
    same = lambda batch, head, query, key: query // slots == key // slots  # noqa: E731
    mask = torch.compile(module.create_block_mask)(same, *sizes, device=device)
    attention = functools.partial(torch.compile(module.flex_attention), block_mask=mask)
    return on_segments(
        case, lambda *qkv: attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
    )


def triton(case: Case, device: torch.device) -> Callable:
    attend = importlib.import_module("triton_attention").window_attention
    return lambda qkv: attend(qkv, case.grid)


def epilogue(case: Case, device: torch.device) -> Callable:
    """Bias and GELU in cuBLASLt's epilogue, of which torch has no derivative."""

    def run(x, w1, b1, w2, b2, weight, bias):
        z, residual = rivals.unshuffle_norm(x, weight, bias, case.grid)
        z = z.view(-1, w1.shape[1])
        hidden = torch._addmm_activation(b1, z, w1.t(), use_gelu=True)
        hidden = hidden.view(len(residual), -1, len(w1)).mean(1)
        return torch.addmm(b2, hidden, w2.t()) + residual

    return run


def eager(case: Case) -> dict[str, Callable[[], Callable]]:
    """Return functions that make the rivals that run as they are."""
    return _forms(case, rivals.eager(case.op))


def handwritten(case: Case, device: torch.device) -> dict[str, Callable[[], Callable]]:
    """Return functions that make the rivals that only a GPU has, and torch.compile does not."""
    found = {}
    if case.op == ATTENTION:
        found["varlen attention (FA2)"] = lambda: varlen(case, device)
        if case.window == 2:
            found["Triton, hand-written"] = lambda: triton(case, device)
    elif case.op in PRODUCTS and not case.backward:
        found["cuBLASLt epilogue"] = lambda: epilogue(case, device)
    return found


def compiled(case: Case, device: torch.device) -> dict[str, Callable[[], Callable]]:
    """Return functions that make the rivals that are compiled when they are first called."""
    found = _forms(case, rivals.compiled(case.op))
    if case.window > 2:  # unless all of it is fused, products of window² x N x C elements
        found.pop("compiled broadcast", None)
    if case.op == ATTENTION and device.type == "cuda":
        found["flex_attention"] = lambda: flex(case, device)
    return found


def _forms(case: Case, forms: dict[str, Callable]) -> dict[str, Callable[[], Callable]]:
    sizes = (case.grid, case.window) if case.op == ATTENTION else (case.grid,)
    return {name: lambda f=f: lambda *tensors: f(*tensors, *sizes) for name, f in forms.items()}
