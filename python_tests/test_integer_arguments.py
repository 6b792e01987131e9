# SPDX-License-Identifier: Apache-2.0
"""Integers of NumPy, as sizes computed with arrays are, do wherever an int does."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import uhd_ops

GRIDS = [(34, 17), (3, 5)]  # ragged for both windows
TOKENS = 34 * 17 + 3 * 5

CALLS = {
    "window_attention": lambda x, n: uhd_ops.window_attention(
        *x[:, None, None].unbind(3), GRIDS, n
    ),
    "pixel_unshuffle": lambda x, n: uhd_ops.pixel_unshuffle(x, GRIDS, n),
    "window_mean": lambda x, n: uhd_ops.window_mean(x, GRIDS, n),
    "pixel_unshuffle_mlp": lambda x, n: uhd_ops.pixel_unshuffle_mlp(
        x, GRIDS, torch.eye(3), None, torch.eye(3), None, factor=n
    ),
    "reorder_tokens": lambda x, n: uhd_ops.reorder_tokens(x, GRIDS, (n,)),
    "tile_vector": lambda x, n: uhd_ops.tile_vector(x[0], n),
    "tile_average": lambda x, n: uhd_ops.tile_average(x[:4], n),
    "tile_block_diagonal": lambda x, n: uhd_ops.tile_block_diagonal(x[:4], n),
}


@pytest.mark.parametrize("call", CALLS)
def test_operators_take_numpy_integers(call):
    """16 is where the area of a window leaves uint8, if it is computed in that type."""
    x = torch.randn(TOKENS, 3)
    for number in (np.uint8(16), np.int64(2)):
        assert torch.equal(CALLS[call](x, number), CALLS[call](x, int(number)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", [np.True_, np.float64(2), np.array([2]), torch.tensor(2), "2"])
def test_what_is_no_integer_is_refused(call, bad):
    with pytest.raises(TypeError, match=f"must be an int, got {type(bad).__name__}$"):
        CALLS[call](torch.randn(TOKENS, 3), bad)


def test_while_compiling_they_are_refused_as_before():
    compiled = torch.compile(CALLS["window_mean"], fullgraph=True, backend="eager")
    x = torch.randn(TOKENS, 3)
    for window in (2, 3, 4):  # from the second on, a symbol
        assert torch.equal(compiled(x, window), uhd_ops.window_mean(x, GRIDS, window))
    with pytest.raises(Exception, match="window must be an int"):
        compiled(x, np.int64(2))


def test_modules_keep_plain_ints():
    """What a module or a model's config holds must compile, and be written to JSON."""
    n = np.uint8
    compressor = uhd_ops.nn.EarlyCompressor(n(16), n(2), hidden_dim=n(32), window=n(2))
    connector = uhd_ops.nn.PixelUnshuffleConnector(n(100), n(8), merger_times=n(1), window=n(2))
    pooling = uhd_ops.nn.WindowTokenCompressor(n(16), hidden_dim=n(32), window=n(2))
    resampler = uhd_ops.nn.QueryResampler(n(16), n(8), num_queries=n(4), num_heads=n(2))
    for module in (compressor, connector, pooling, resampler):
        assert not [k for k, value in vars(module).items() if isinstance(value, np.generic)]
        module(torch.randn(TOKENS, int(module.dim)), GRIDS)
    ratios = uhd_ops.nn.choose_ratios(
        [0.1, 5.0], [(4, 4)] * 2, n(20), ratios=[n(1), n(4)], window=n(2)
    )
    assert ratios == [4, 1]
    assert not any(isinstance(ratio, np.generic) for ratio in ratios)


def vit():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)


def test_retrofit_takes_numpy_integers_and_any_sequence():
    n = np.int64
    early = uhd_ops.insert_early_compressor(vit(), layer=n(1), window=n(2)).compression
    assert early == uhd_ops.insert_early_compressor(vit(), layer=1).compression
    assert (type(early.layers[0]), type(early.window)) == (int, int)
    image = torch.randn(1, 3, 32, 32)
    for layers in (range(2), [n(0), n(1)]):
        model = uhd_ops.insert_progressive_compression(vit(), layers, hidden_dim=n(8), window=n(2))
        assert uhd_ops.insert_progressive_compression(model, (0, 1), hidden_dim=8) is model
        assert model.forward_features(image).shape == (1, 1 + 1, 16)
    refined = uhd_ops.refine_patch_embedding(vit(), n(4), img_size=(n(32), n(64)))
    assert refined.patch_embed.grid_size == (8, 16)
