# SPDX-License-Identifier: Apache-2.0
"""nn.QueryResampler is attention of learned queries to the tokens of each view, one by one."""

import functools
import math

import pytest
import torch
from families.case import assert_close as close
from torch.nn import functional

from uhd_ops.nn import QueryResampler
from uhd_ops.nn.query_resampler import sincos_2d

DIM, OUT, QUERIES, HEADS = 12, 32, 5, 2
GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS = 40
# A dozen products of at most 40 terms, one after the other; float32 rounds a sine either way.
assert_close = functools.partial(close, roundings=12 * TOKENS)


def resampler(dim=DIM, **options):
    module = QueryResampler(dim, OUT, num_queries=QUERIES, num_heads=HEADS, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def by_hand(module, view, grid):
    """One view, by the formula."""
    keys = functional.layer_norm(
        module.kv_proj(view), (OUT,), module.ln_kv.weight, module.ln_kv.bias, 1e-6
    )
    table = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            table.append(
                [
                    f(position / 10000 ** (i / (OUT // 4)))
                    for position in (column, row)
                    for f in (math.sin, math.cos)
                    for i in range(OUT // 4)
                ]
            )
    # The embedding is stored in float32, as the module's is.
    table = torch.tensor(table, dtype=torch.float32).double()
    weights = module.attn.in_proj_weight.chunk(3)
    biases = module.attn.in_proj_bias.chunk(3)
    inputs = (module.ln_q(module.query), keys + table, keys)
    q, k, v = (
        functional.linear(x, w, b).unflatten(1, (HEADS, -1)).transpose(0, 1)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    scores = (q @ k.mT / (OUT // HEADS) ** 0.5).softmax(-1)
    out = module.attn.out_proj((scores @ v).transpose(0, 1).flatten(1))
    return module.ln_post(out) @ module.proj


@pytest.mark.parametrize("dim", [DIM, OUT])
@torch.no_grad()
def test_definition(dim):
    module, x = resampler(dim), torch.randn(TOKENS, dim, dtype=torch.float64)
    parts = x.split([h * w for h, w in GRIDS])
    expected = [by_hand(module, *pair) for pair in zip(parts, GRIDS, strict=True)]
    assert_close(module(x, GRIDS), torch.stack(expected))
    batch = torch.randn(2, 15, dim, dtype=torch.float64)
    expected = [by_hand(module, view, (3, 5)) for view in batch]
    assert_close(module(batch, (3, 5)), torch.stack(expected))
    assert module(x[:0], []).shape == (0, QUERIES, OUT)


def test_names_are_those_of_the_released_resampler():
    names = {
        *("query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias"),
        *(f"ln_{part}.{kind}" for part in ("q", "kv", "post") for kind in ("weight", "bias")),
    }
    assert set(resampler().state_dict()) == names


def test_embedding():
    table = sincos_2d((2, 3), 8, "cpu")
    assert table.shape == (6, 8)
    assert torch.equal(table[0], torch.tensor([0, 0, 1, 1] * 2, dtype=torch.float32))
    assert torch.equal(table[1, 4:], table[0, 4:])  # one column further: the same row
