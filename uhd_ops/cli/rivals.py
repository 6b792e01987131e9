# SPDX-License-Identifier: Apache-2.0
"""The strongest ways to write each operation in PyTorch for one grid with even sides.

``uhd-ops bench`` and ``benchmarks/`` time them. Each takes the tensors that our operator takes for
a single view, and that view's grid (height, width); each is checked against the definition before
it is timed. Windows are 2 x 2, or for attention of any ``side`` that divides the grid. Attention
reads a packed projection ``(N, 3, H, D)``, whose windows are gathered at once: three slices would
be three copies, and as many of their gradients before these are joined.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def split(x: torch.Tensor, grid: tuple[int, int], side: int = 2) -> torch.Tensor:
    """``(N, ...)`` in raster order to ``(N / side², side², ...)``, a window's tokens together."""
    (h, w), rest = grid, x.shape[1:]
    x = x.view(h // side, side, w // side, side, *rest).transpose(1, 2)
    return x.reshape(h * w // side**2, side**2, *rest)


def join(x: torch.Tensor, grid: tuple[int, int], side: int = 2) -> torch.Tensor:
    """Inverse of :func:`split`."""
    (h, w), rest = grid, x.shape[2:]
    x = x.view(h // side, w // side, side, side, *rest).transpose(1, 2)
    return x.reshape(h * w, *rest)


def attention_sdpa(qkv, grid, side=2):
    """Attend with torch's own kernel, windows as the batch."""
    q, k, v = split(qkv, grid, side).transpose(1, 3).unbind(2)
    return join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), grid, side)


def attention_einsum(qkv, grid, side=2):
    """Attend with two einsums and a softmax."""
    q, k, v = split(qkv, grid, side).unbind(2)
    scores = torch.einsum("mihd,mjhd->mhij", q, k) * q.shape[-1] ** -0.5
    return join(torch.einsum("mhij,mjhd->mihd", scores.softmax(-1), v), grid, side)


def attention_matmul(qkv, grid, side=2):
    """Attend with two batched products and a softmax."""
    q, k, v = split(qkv, grid, side).transpose(1, 3).unbind(2)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return join((weights @ v).transpose(1, 2), grid, side)


def attention_broadcast(qkv, grid, side=2):
    """Multiply and sum without a matrix product: the form that torch.compile fuses best."""
    q, k, v = split(qkv, grid, side).unbind(2)
    scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * q.shape[-1] ** -0.5
    return join((scores.softmax(2).unsqueeze(-1) * v.unsqueeze(1)).sum(2), grid, side)


def unshuffle(x, grid):
    """Lay the tokens of a window side by side."""
    return split(x, grid).flatten(1)


def mean(x, grid):
    """Average the tokens of a window."""
    return split(x, grid).mean(1)


def mean_avg_pool(x, grid):
    """Pool the channels-last image that the tokens are."""
    image = x.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pool(x, logits, grid):
    """Average the tokens of a window, weighted by the softmax of their logits in each channel."""
    return (split(logits, grid).softmax(1) * split(x, grid)).sum(1)


def unshuffle_norm(x, weight, bias, grid):
    """Return the LayerNorm of merged tokens, and the means of their tokens."""
    z = split(x, grid)
    return F.layer_norm(z.flatten(1), (z.shape[1] * z.shape[2],), weight, bias, 1e-6), z.mean(1)


def mlp_dense(x, w1, b1, w2, b2, weight, bias, grid):
    """Merge tokens with torch's LayerNorm, linear layers and mean."""
    z, residual = unshuffle_norm(x, weight, bias, grid)
    hidden = F.gelu(F.linear(z, w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2) + residual


def mlp_tied(x, w1, b1, w2, b2, weight, bias, grid):
    """The tied form with the hidden averaged before the second product: the least work in eager."""
    z, residual = unshuffle_norm(x, weight, bias, grid)
    hidden = F.gelu(F.linear(z.view(-1, x.shape[1]), w1, b1), approximate="tanh")
    return F.linear(hidden.view(-1, 4, hidden.shape[1]).mean(1), w2, b2) + residual


def reuse_tiles(w1, w2, grid):
    """Repeat the weights of a tied MLP for the dense form; the grid does not matter."""
    return torch.block_diag(*[w1] * 4), (w2 / 4).repeat(1, 4)


# What runs as it is, by operator; a name tells the forms of one operator apart.
EAGER: dict[str, dict[str, Callable]] = {
    "window_attention": {
        "SDPA": attention_sdpa,
        "einsum": attention_einsum,
        "matmul": attention_matmul,
    },
    "pixel_unshuffle": {"": unshuffle},
    "window_mean": {"": mean, "avg_pool2d": mean_avg_pool},
    "window_pool": {"": pool},
    "gather + LayerNorm + mean": {"": unshuffle_norm},
    "pixel_unshuffle_mlp tied": {"": mlp_tied},
    "pixel_unshuffle_mlp dense": {"": mlp_dense},
    "tile_weight": {"": reuse_tiles},
}
# What torch.compile makes the most of.
COMPILED: dict[str, dict[str, Callable]] = {
    "window_attention": {"broadcast": attention_broadcast, "SDPA": attention_sdpa},
    **{name: {"": forms[""]} for name, forms in EAGER.items() if "" in forms},
}


def eager(name: str) -> dict[str, Callable]:
    """Return the eager rivals of an operator by the names that tables show."""
    return {f"eager {form}".strip(): function for form, function in EAGER[name].items()}


def compiled(name: str) -> dict[str, Callable]:
    """Return the compiled rivals of an operator; each is compiled when it is first called."""
    return {f"compiled {form}".strip(): torch.compile(f) for form, f in COMPILED[name].items()}
