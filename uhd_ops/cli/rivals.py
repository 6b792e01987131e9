# SPDX-License-Identifier: Apache-2.0
"""The strongest ways to write each operation in PyTorch, where windows divide every view.

``uhd-ops bench`` and ``benchmarks/`` time them. Each takes the tensors that our operator takes, and
the grid (height, width) of a single view, or the grids of several that are packed one after
another; each is checked against the definition before it is timed. Windows have sides of ``side``
tokens. Attention reads a packed projection ``(N, 3, H, D)``, whose windows are gathered at once:
three slices would be three copies, and as many of their gradients before these are joined. Windows
of several views are joined first, so that one call serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Views = tuple[int, int] | Sequence[tuple[int, int]]


def split(x: torch.Tensor, grid: Views, side: int = 2) -> torch.Tensor:
    """``(N, ...)`` in raster order to ``(N / side², side², ...)``, a window's tokens together."""
    if not isinstance(grid[0], int):
        return by_view(split, x, grid, side)
    (h, w), rest = grid, x.shape[1:]
    x = x.view(h // side, side, w // side, side, *rest).transpose(1, 2)
    return x.reshape(h * w // side**2, side**2, *rest)


def join(x: torch.Tensor, grid: Views, side: int = 2) -> torch.Tensor:
    """Inverse of :func:`split`."""
    if not isinstance(grid[0], int):
        return by_view(join, x, grid, side, rows_per=side**2)
    (h, w), rest = grid, x.shape[2:]
    x = x.view(h // side, w // side, side, side, *rest).transpose(1, 2)
    return x.reshape(h * w, *rest)


def by_view(function: Callable, x: torch.Tensor, grids: Views, side: int, rows_per: int = 1):
    """Call ``function`` on the rows of each view, and join the results."""
    if len(grids) == 1:
        return function(x, grids[0], side)
    parts = x.split([h * w // rows_per for h, w in grids])
    return torch.cat([function(part, grid, side) for part, grid in zip(parts, grids, strict=True)])


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


def unshuffle(x, grid, side=2):
    """Lay the tokens of a window side by side."""
    return split(x, grid, side).flatten(1)


def mean(x, grid, side=2):
    """Average the tokens of a window."""
    return split(x, grid, side).mean(1)


def mean_avg_pool(x, grid, side=2):
    """Pool the channels-last image that the tokens are."""
    if not isinstance(grid[0], int):
        return by_view(mean_avg_pool, x, grid, side)
    image = x.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(image, side).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pool(x, logits, grid, side=2):
    """Average the tokens of a window, weighted by the softmax of their logits in each channel."""
    return (split(logits, grid, side).softmax(1) * split(x, grid, side)).sum(1)


def unshuffle_norm(x, weight, bias, grid, side=2):
    """Return the LayerNorm of merged tokens, and the means of their tokens."""
    z = split(x, grid, side)
    return F.layer_norm(z.flatten(1), (z.shape[1] * z.shape[2],), weight, bias, 1e-6), z.mean(1)


def mlp_dense(x, w1, b1, w2, b2, weight, bias, grid, side=2):
    """Merge tokens with torch's LayerNorm, linear layers and mean."""
    z, residual = unshuffle_norm(x, weight, bias, grid, side)
    hidden = F.gelu(F.linear(z, w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2) + residual


def mlp_tied(x, w1, b1, w2, b2, weight, bias, grid, side=2):
    """The tied form with the hidden averaged before the second product: the least work in eager."""
    z, residual = unshuffle_norm(x, weight, bias, grid, side)
    hidden = F.gelu(F.linear(z.view(-1, x.shape[1]), w1, b1), approximate="tanh")
    return F.linear(hidden.view(-1, side**2, hidden.shape[1]).mean(1), w2, b2) + residual


def reuse_tiles(w1, w2, grid, side=2):
    """Repeat the weights of a tied MLP for the dense form; the grid does not matter."""
    cells = side**2
    return torch.block_diag(*[w1] * cells), (w2 / cells).repeat(1, cells)


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
