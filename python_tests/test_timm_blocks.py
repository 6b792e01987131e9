# SPDX-License-Identifier: Apache-2.0
"""What is special to VisionTransformer's other blocks, attentions, MLPs and pools."""

import copy

import pytest
import torch
from families.case import assert_close, random_images
from families.timm_blocks import by_hand, fused, hybrid
from families.vision_transformer import by_hand as by_hand_of_plain_blocks
from families.vision_transformer import make
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from uhd_ops import insert_early_compressor
from uhd_ops.nn import EarlyCompressor

DIM, HEADS = 32, 2
BLOCKS = [Block, ResPostBlock, ParallelScalingBlock, DiffParallelScalingBlock, ParallelThingsBlock]


@pytest.mark.parametrize("pool", ["", "token", "avg", "avgmax", "max", "map", "prr"])
@pytest.mark.parametrize("block_fn", [Block, ParallelScalingBlock])
@torch.no_grad()
def test_pools_work_on_merged_tokens(pool, block_fn):
    model = make(global_pool=pool, block_fn=block_fn, reg_tokens=2).double()
    x = random_images(model, dtype=torch.float64)
    _, features = (by_hand_of_plain_blocks if block_fn is Block else by_hand)(model, x)
    expected = model.forward_head(features)
    assert_close(insert_early_compressor(model, 1)(x), expected, 12 * 512)


@pytest.mark.parametrize("block_fn", BLOCKS)
@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_without_attention_nothing_else_is_missing(block_fn, form):
    # A fused output projection has one bias; it stays with the MLP.
    block = block_fn(DIM, HEADS) if block_fn is not ParallelScalingBlock else fused(DIM, HEADS)
    compressor = EarlyCompressor.from_block(block, form=form, attention=False)
    names = {name for name, _ in compressor.named_parameters()}
    assert not any(name.startswith("attn") for name in names)
    assert any(name.endswith("fc2.bias") for name in names)


@pytest.mark.parametrize("block_fn", BLOCKS)
@pytest.mark.parametrize("rate", ["drop_path", "attn_drop", "proj_drop"])
def test_regularisation_acts_in_training_only(block_fn, rate):
    block = block_fn(DIM, HEADS, **{rate: 0.5})
    compressor = EarlyCompressor.from_block(block.train())
    x = torch.randn(4, 25, DIM)
    assert compressor.training
    assert not torch.equal(compressor(x, (5, 5)), compressor(x, (5, 5)))
    compressor.eval()
    plain = EarlyCompressor.from_block(copy.deepcopy(block).eval())
    assert torch.equal(compressor(x, (5, 5)), plain(x, (5, 5)))


@pytest.mark.parametrize("mlp_layer", [SwiGLU, SwiGLUPacked])
def test_gates_have_weights_of_their_own(mlp_layer):
    # The block diagonal of a packed GLU as a whole would make some patches the gates of others.
    block = Block(DIM, HEADS, mlp_layer=mlp_layer)
    mlp = EarlyCompressor.from_block(block).mlp
    if mlp_layer is SwiGLU:
        gate, fc1 = block.mlp.fc1_g, block.mlp.fc1_x
        weights = gate.weight, fc1.weight
    else:
        weights = block.mlp.fc1.weight.chunk(2)
    for layer, weight in zip((mlp.gate, mlp.fc1), weights, strict=True):
        assert torch.equal(layer.weight, torch.block_diag(*[weight] * 4))


def test_a_stem_that_rounds_up_is_not_misread():
    # timm's HybridEmbed tells 7 x 7 patches for 30 px, of which its stem makes 8 x 8.
    model = make(embed_layer=hybrid, patch_size=1, dynamic_img_size=True)
    insert_early_compressor(model, 1)
    with pytest.raises(
        ValueError, match=r"1 prefix tokens and 7 x 7 patches, .* got shape \(2, 65"
    ):
        model(random_images(model, size=(30, 30)))
