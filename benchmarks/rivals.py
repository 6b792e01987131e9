# SPDX-License-Identifier: Apache-2.0
"""The strongest ways to write each operation in PyTorch for one grid with even sides.

Each takes the arguments that our operator takes for a single view, and is checked against the
definition before it is timed. Windows are 2 x 2, or of another side that divides the grid.
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


def attention_sdpa(q, k, v, grid, side=2):
    q, k, v = (split(x, grid, side).transpose(1, 2) for x in (q, k, v))
    return join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), grid, side)


def attention_einsum(q, k, v, grid, side=2):
    q, k, v = (split(x, grid, side) for x in (q, k, v))
    scores = torch.einsum("mihd,mjhd->mhij", q, k) * q.shape[-1] ** -0.5
    return join(torch.einsum("mhij,mjhd->mihd", scores.softmax(-1), v), grid, side)


def attention_matmul(q, k, v, grid, side=2):
    q, k, v = (split(x, grid, side).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return join((weights @ v).transpose(1, 2), grid, side)


def attention_broadcast(q, k, v, grid, side=2):
    """Multiply and sum without a matrix product: the form that torch.compile fuses best."""
    q, k, v = (split(x, grid, side) for x in (q, k, v))
    scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * q.shape[-1] ** -0.5
    return join((scores.softmax(2).unsqueeze(-1) * v.unsqueeze(1)).sum(2), grid, side)


def unshuffle(x, grid):
    return split(x, grid).flatten(1)


def mean(x, grid):
    return split(x, grid).mean(1)


def mean_avg_pool(x, grid):
    """Average pooling of the channels-last image that the tokens are."""
    image = x.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pool(x, logits, grid):
    return (split(logits, grid).softmax(1) * split(x, grid)).sum(1)


def unshuffle_norm(x, weight, bias, grid):
    z = split(x, grid)
    return F.layer_norm(z.flatten(1), (z.shape[1] * z.shape[2],), weight, bias, 1e-6), z.mean(1)


def mlp_dense(x, w1, b1, w2, b2, weight, bias, grid):
    z, residual = unshuffle_norm(x, weight, bias, grid)
    hidden = F.gelu(F.linear(z, w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2) + residual


def mlp_tied(x, w1, b1, w2, b2, weight, bias, grid):
    """The tied form with the hidden averaged before the second product: the least work in eager."""
    z, residual = unshuffle_norm(x, weight, bias, grid)
    hidden = F.gelu(F.linear(z.view(-1, x.shape[1]), w1, b1), approximate="tanh")
    return F.linear(hidden.view(-1, 4, hidden.shape[1]).mean(1), w2, b2) + residual


ATTENTION: dict[str, Callable] = {
    "eager SDPA": attention_sdpa,
    "eager einsum": attention_einsum,
    "eager matmul": attention_matmul,
    "compiled broadcast": torch.compile(attention_broadcast),
    "compiled SDPA": torch.compile(attention_sdpa),
}
UNSHUFFLE: dict[str, Callable] = {"eager": unshuffle, "compiled": torch.compile(unshuffle)}
MEAN: dict[str, Callable] = {
    "eager": mean,
    "eager avg_pool2d": mean_avg_pool,
    "compiled": torch.compile(mean),
}
POOL: dict[str, Callable] = {"eager": pool, "compiled": torch.compile(pool)}
NORM: dict[str, Callable] = {"eager": unshuffle_norm, "compiled": torch.compile(unshuffle_norm)}
