# SPDX-License-Identifier: Apache-2.0
"""Cait with random biases in the mixing behind the softmax, which no softmax normalises."""

import pytest
import torch
from families.case import assert_close, random_images
from families.timm_cait import SIZE, by_hand, make_biased

from uhd_ops import insert_early_compressor
from uhd_ops.nn import EarlyCompressor

# Sums of at most 49 weights and 128 hidden channels, a dozen products in a row.
ROUNDINGS = 12 * 512


@pytest.mark.parametrize("options", [{}, {"img_size": (20, 36)}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("window", [2, 3])
@torch.no_grad()
def test_definition(options, window):
    model = make_biased(**options).double()
    x = random_images(model, dtype=torch.float64)
    outs, features = by_hand(model, x, layer=1, window=window)
    insert_early_compressor(model, 1, window=window)
    assert_close(model.forward_features(x), features, ROUNDINGS)
    _, maps = model.forward_intermediates(x)
    for actual, out in zip(maps, outs, strict=True):
        assert_close(actual.flatten(2).transpose(1, 2), out, ROUNDINGS)


@torch.no_grad()
def test_a_window_depends_on_its_own_tokens_only():
    compressor = EarlyCompressor.from_block(make_biased().double().blocks[1])
    x = torch.randn(6, 8, SIZE["embed_dim"], dtype=torch.float64)
    whole = compressor(x.flatten(0, 1), [(6, 8)]).unflatten(0, (3, 4))
    corner = compressor(x[:4, :2].flatten(0, 1), [(4, 2)]).unflatten(0, (2, 1))
    assert_close(corner, whole[:2, :1], ROUNDINGS)


@torch.no_grad()
def test_packed_views_keep_their_own_sizes():
    compressor = EarlyCompressor.from_block(make_biased().double().blocks[1])
    grids = [(4, 6), (3, 5), (0, 2), (1, 1), (4, 6)]
    views = [torch.randn(h * w, SIZE["embed_dim"], dtype=torch.float64) for h, w in grids]
    alone = [compressor(view, [grid]) for view, grid in zip(views, grids, strict=True)]
    assert_close(compressor(torch.cat(views), grids), torch.cat(alone), ROUNDINGS)
    batch = torch.stack([views[0], views[-1]])
    assert_close(compressor(batch, grids[0]), torch.stack([alone[0], alone[-1]]), ROUNDINGS)
    assert compressor(batch[:0], grids[0]).shape == (0, 6, SIZE["embed_dim"])


def test_dropout_of_attention_weights_and_outputs():
    block = make_biased(attn_drop_rate=0.5, proj_drop_rate=0.5).blocks[1]
    compressor = EarlyCompressor.from_block(block.train())
    x = torch.randn(16, SIZE["embed_dim"])
    assert not torch.equal(compressor.attn(x, (4, 4)), compressor.attn(x, (4, 4)))
    compressor.eval()
    assert torch.equal(compressor.attn(x, (4, 4)), compressor.attn(x, (4, 4)))
