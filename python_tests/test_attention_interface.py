# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="uhd_ops" computes what transformers' own attention does, or refuses."""

import copy
import itertools

import pytest
import torch
from tiny_minicpm import EVEN, TEXT, TOWERS, assert_close, images, randomized, tiny_tower
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from uhd_ops.integrations.transformers import register_attention
from uhd_ops.integrations.transformers.attention_interface import attention_forward

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture(autouse=True)
def registered():
    assert register_attention() == register_attention() == "uhd_ops"


class Caller(nn.Module):
    """Stands for an attention module."""

    is_causal = False


def definition(query, key, value, starts, scaling):
    """Loop over segments; ``(B, H, L, D)`` to ``(B, L, H, D)``."""
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for start, end in itertools.pairwise(starts):
        for head in range(query.shape[1]):
            q, k, v = query[:, head], key[:, head // groups], value[:, head // groups]
            q, k, v = (x[:, start:end] for x in (q, k, v))
            out[:, head, start:end] = (q @ k.mT * scaling).softmax(-1) @ v
    return out.transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("starts", [None, [0, 4, 8, 15, 19, 20, 20], [0, 20]])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_segments(batch, heads, starts, scaling):
    query = torch.randn(batch, heads[0], 20, 8, dtype=torch.float64)
    key, value = torch.randn(2, batch, heads[1], 20, 8, dtype=torch.float64)
    bounds = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8}
    actual, weights = attention_forward(
        Caller(), query, key, value, None, scaling=scaling, is_causal=False, **options
    )
    assert weights is None
    expected = definition(query, key, value, starts or [0, 20], scaling or 8**-0.5)
    assert_close(actual, expected)


@pytest.mark.parametrize("version", TOWERS)
def test_minicpm(version):
    tower = tiny_tower(version)
    pixels, sizes = images(EVEN)
    expected = tower(pixels, target_sizes=sizes).last_hidden_state
    tower.set_attn_implementation("uhd_ops")
    assert_close(tower(pixels, target_sizes=sizes).last_hidden_state, expected)


def test_qwen():
    config = Qwen2_5_VisionTransformerPretrainedModel.config_class(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32,
        patch_size=8, window_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    tower = randomized(Qwen2_5_VisionTransformerPretrainedModel(config).double())
    grids = torch.tensor([[1, 6, 8], [1, 4, 10]])
    patches = torch.randn(88, 3 * 2 * 8 * 8, dtype=torch.float64)
    expected = tower(patches, grids).last_hidden_state
    tower.set_attn_implementation("uhd_ops")
    assert_close(tower(patches, grids).last_hidden_state, expected)


def test_batches():
    config = SiglipVisionConfig(**TINY, image_size=32, num_hidden_layers=2)
    model = randomized(SiglipVisionModel(config).double())
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = model(pixels).last_hidden_state
    model.set_attn_implementation("uhd_ops")
    assert_close(model(pixels).last_hidden_state, expected)


def test_gradients():
    config = SiglipVisionConfig(**TINY, image_size=32, num_hidden_layers=2)
    models = [randomized(SiglipVisionModel(config).double())]
    models.append(copy.deepcopy(models[0]))
    models[1].set_attn_implementation("uhd_ops")
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in models:
        model(pixels).last_hidden_state.square().sum().backward()
    for expected, actual in zip(*(model.parameters() for model in models), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad)


def test_padding_masks_are_refused_not_dropped():
    config = Siglip2VisionConfig(**TINY, num_hidden_layers=1, num_patches=16)
    model = randomized(Siglip2VisionModel(config).double())
    model.set_attn_implementation("uhd_ops")
    patches = torch.randn(2, 16, 3 * 8 * 8, dtype=torch.float64)
    mask, shapes = torch.ones(2, 16, dtype=torch.int64), torch.tensor([[4, 4], [4, 4]])
    model(patches, mask, shapes)
    mask[1, 12:] = 0
    shapes[1, 0] = 3
    with pytest.raises(NotImplementedError, match=r"no attention_mask, got shape \(2, 1, 16, 16\)"):
        model(patches, mask, shapes)


def test_language_models_are_refused():
    config = AutoConfig.for_model(**TEXT, attn_implementation="uhd_ops")
    model = AutoModel.from_config(config)
    with pytest.raises(NotImplementedError, match="supports no is_causal, got True"):
        model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 0.1}, NotImplementedError, "supports no dropout, got 0.1"),
        ({"sliding_window": 4}, NotImplementedError, "supports no sliding_window, got 4"),
        ({"softcap": 30.0}, NotImplementedError, "supports no softcap, got 30.0"),
        ({"position_bias": torch.ones(2)}, NotImplementedError, r"position_bias, got shape \(2,\)"),
        ({"is_causal": True}, NotImplementedError, "supports no is_causal"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, NotImplementedError, "must be the same"),
        ({"cu": [0, 2, 5]}, ValueError, r"from 0 to the 6 tokens of query, got \[0, 2, 5\]"),
        ({"cu": [0, 4, 2, 6]}, ValueError, r"must ascend .* got \[0, 4, 2, 6\]"),
        ({"cu": [1, 6]}, ValueError, r"must ascend .* got \[1, 6\]"),
        ({"cu": []}, ValueError, r"must ascend .* got \[\]"),
    ],
)
def test_refusals(options, error, message):
    if "cu" in options:
        bounds = torch.tensor(options["cu"], dtype=torch.int32)
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(error, match=message):
        attention_forward(Caller(), x, x, x, None, **options)


def test_other_lengths_of_keys():
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match="query and key must have the same length"):
        attention_forward(Caller(), x, x[:, :, :3], x[:, :, :3], None)


def test_causal_is_the_default_of_unknown_modules():
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match="supports no is_causal"):
        attention_forward(nn.Identity(), x, x, x, None)
    assert "uhd_ops" in AttentionInterface().valid_keys()
