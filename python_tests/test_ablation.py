# SPDX-License-Identifier: Apache-2.0
"""Every variant of LLaVA-UHD v4's Table 4 computes its structure, window by window."""

import pytest
import torch
from families.case import assert_close, packed_windows
from families.vision_transformer import make
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn import functional

from uhd_ops import insert_early_compressor
from uhd_ops.nn import ABLATION, EarlyCompressor

DIM = 32
GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS = 40
# Sums of at most 4 * 4 * DIM terms, a dozen one after the other.
ROUNDINGS = 12 * 16 * DIM


def block_and_tokens(**options):
    torch.manual_seed(0)
    block = make(**options).double().blocks[0]
    return block, torch.randn(TOKENS, DIM, dtype=torch.float64)


def cross(block, x, grids, query, window):
    """Cross-attention by hand: one query per window, then the block's MLP on the merged token."""
    attn, out = block.attn, []
    for present, _ in packed_windows(grids, window):
        rows = x[present]
        q, k, v = attn.qkv(block.norm1(rows)).view(-1, 3, attn.num_heads, 16).unbind(1)
        first = query == "cross_top_left"
        base, q = (rows[0], q[0]) if first else (rows.mean(0), q.mean(0))
        scores = torch.einsum("hd,nhd->hn", attn.q_norm(q), attn.k_norm(k)) / 4
        merged = torch.einsum("hn,nhd->hd", scores.softmax(1), v).flatten()
        y = base + block.ls1(attn.proj(merged))
        out.append(y + block.ls2(block.mlp(block.norm2(y))))
    return torch.stack(out)


def attended(block, x, present):
    return x[present] + block.ls1(block.attn(block.norm1(x[present])[None]))[0]


def plain(block, compressor, x, grids, attention):
    """The small MLP by hand, with or without window attention in front."""
    mlp, out = compressor.mlp, []
    for present, slots in packed_windows(grids):
        y = x.clone()
        if attention:
            y[present] = attended(block, x, present)
        z = functional.layer_norm(y[slots].flatten(), (4 * DIM,), eps=1e-6)
        z = z * mlp.norm.weight + mlp.norm.bias
        out.append(y[present].mean(0) + mlp.fc2(functional.gelu(mlp.fc1(z))))
    return torch.stack(out)


# In a 2 x 2 window that is cut off, the tokens that stand in for missing ones change no average;
# in a 3 x 3 window they would.
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("query", ["cross_top_left", "cross_mean"])
@pytest.mark.parametrize("options", [{"init_values": 0.3}, {"qkv_bias": False}], ids=str)
@torch.no_grad()
def test_cross_attention(query, options, window):
    block, x = block_and_tokens(**options)
    compressor = EarlyCompressor.from_block(block, attention=query, window=window)
    assert_close(compressor(x, GRIDS), cross(block, x, GRIDS, query, window), ROUNDINGS)


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_plain_mlp(attention):
    block, x = block_and_tokens(init_values=0.3)
    compressor = EarlyCompressor.from_block(block, attention=attention, mlp="plain")
    for parameter in compressor.mlp.parameters():
        parameter.normal_(std=0.3)
    expected = plain(block, compressor, x, GRIDS, attention)
    assert_close(compressor(x, GRIDS), expected, ROUNDINGS)


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_no_mlp_is_the_mean(attention):
    block, x = block_and_tokens()
    compressor = EarlyCompressor.from_block(block, attention=attention, mlp="none")
    view = x[:24]
    windows = [
        attended(block, view, present) if attention else view[present]
        for present, _ in packed_windows([(4, 6)])
    ]
    expected = torch.stack([window.mean(0) for window in windows])
    assert_close(compressor(view, [(4, 6)]), expected, ROUNDINGS)
    assert bool(list(compressor.parameters())) is attention


@pytest.mark.parametrize("name", ABLATION)
def test_every_variant_in_a_model(name):
    vit = insert_early_compressor(make(), 1, **ABLATION[name])
    x = torch.randn(2, 3, 28, 28)
    assert vit.forward_features(x).shape == (2, 17, DIM)
    vit(x).square().sum().backward()
    for key, parameter in vit.named_parameters():
        if ".compressor." in key:
            assert parameter.grad.any(), key
    torch._dynamo.reset()
    compiled = torch.compile(vit.forward_features, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), vit.forward_features(x))
    batched = vit.blocks[1].compressor(torch.randn(2, 15, DIM), (3, 5))
    assert batched.shape == (2, 6, DIM)


@pytest.mark.parametrize("query", ["cross_top_left", "cross_mean"])
def test_what_cross_attention_refuses(query):
    with pytest.raises(NotImplementedError, match=f'attention="{query}" needs a block with one'):
        EarlyCompressor.from_block(ParallelScalingBlock(DIM, 2), attention=query)
    with pytest.raises(ValueError, match='mlp must be "reuse" or "none" with attention='):
        EarlyCompressor(DIM, 2, attention=query, mlp="plain")
