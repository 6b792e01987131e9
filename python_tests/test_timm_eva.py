# SPDX-License-Identifier: Apache-2.0
"""What is special to timm's Eva: its blocks' options, masks, patch dropout and features."""

from functools import partial

import pytest
import torch
from families.case import assert_close, merge_by_hand, mlp_mean, randomise
from timm.layers import LayerNorm, RotaryEmbeddingCat
from timm.models.eva import EvaBlock, EvaBlockPostNorm

from uhd_ops.nn import EarlyCompressor
from uhd_ops.retrofit.rope import window_rotary

# Products of at most 4 * 4 * 32 terms, a dozen one after the other, in float64.
ROUNDINGS = 12 * 512
NORM = {"norm_layer": partial(LayerNorm, eps=1e-3)}
BLOCKS = {
    "gate": {"gated_attn": True},
    "gate of Eva": {"gated_attn": True, "attn_type": "rope", "scale_attn_inner": True},
    "norms of Eva": {"qk_norm": True, "scale_attn_inner": True, "init_values": 0.3},
    "separate projections": {"qkv_fused": False, "qk_norm": True},
    "grouped queries": {
        "qkv_fused": False,
        "attn_type": "rope",
        "num_kv_heads": 2,
        "gated_attn": True,
        "rotate_half": True,
        "attn_head_dim": 12,
    },
    "gate, norm, aligned": {"swiglu_mlp": True, "scale_mlp": True, "swiglu_align_to": 24},
    "norm of the MLP": {"scale_mlp": True},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_options_of_blocks(options):
    options = {"num_prefix_tokens": 0, **NORM, **options}
    block = randomise(EvaBlock(32, 4, **options)).double()
    if getattr(block.attn, "k_bias", None) is not None:
        block.attn.k_bias.normal_()  # zeros in timm, but that is what it adds
    half, dim = options.get("rotate_half", False), options.get("attn_head_dim", 8)
    rope = RotaryEmbeddingCat(dim, in_pixels=False, rotate_half=half).get_embed((3, 5)).double()
    x = torch.randn(15, 32, dtype=torch.float64)
    gamma = [1 if g is None else g for g in (block.gamma_1, block.gamma_2)]
    expected = merge_by_hand(
        x,
        (3, 5),
        2,
        lambda x, rows: gamma[0] * block.attn(block.norm1(x[None]), rope=rope[rows])[0],
        lambda z: gamma[1] * mlp_mean(block.norm2, block.mlp, z),
    )
    compressor = EarlyCompressor.from_block(block)
    assert_close(compressor(x, (3, 5), window_rotary(rope)), expected, ROUNDINGS)
    batched = compressor(x.expand(2, -1, -1), (3, 5), window_rotary(rope))
    assert_close(batched[1], expected, ROUNDINGS)


@torch.no_grad()
def test_bias_added_separately_and_fused_are_the_same():
    block = randomise(EvaBlock(32, 4, num_prefix_tokens=0)).double()
    x = torch.randn(9, 32, dtype=torch.float64)
    expected = EarlyCompressor.from_block(block)(x, (3, 3))
    block.attn.qkv_bias_separate = True
    assert torch.equal(EarlyCompressor.from_block(block)(x, (3, 3)), expected)


def test_rates_are_those_of_the_block():
    options = {"proj_drop": 0.1, "attn_drop": 0.2, "drop_path": 0.3}
    for cls in (EvaBlock, EvaBlockPostNorm):
        compressor = EarlyCompressor.from_block(
            cls(32, 4, scale_attn_inner=True, **NORM, **options)
        )
        assert compressor.attn.attention_dropout == 0.2
        assert compressor.attn.proj_dropout == compressor.mlp.output_drop.p == 0.1
        assert compressor.mlp.hidden_dropout == 0.1
        assert compressor.attn.drop_path == compressor.mlp.drop_path == 0.3


def test_blocks_that_are_not_understood():
    block = EvaBlock(32, 4)
    block.attn.qkv = torch.nn.utils.parametrizations.weight_norm(block.attn.qkv)
    with pytest.raises(NotImplementedError, match=r"block\.attn\.qkv must be Linear"):
        EarlyCompressor.from_block(block)
    block = EvaBlock(32, 4)
    block.attn = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=r"block\.attn must be AttentionRope or EvaAtt"):
        EarlyCompressor.from_block(block)
