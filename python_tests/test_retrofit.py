# SPDX-License-Identifier: Apache-2.0
"""A retrofitted timm VisionTransformer computes the right thing on every way through the model."""

import copy

import pytest
import timm
import torch
from families import vision_transformer
from timm.models._features import FeatureGetterNet
from tiny_vits import FEATURES, images, tiny_distilled, tiny_vit
from torch import nn

from uhd_ops import insert_early_compressor

LAYER = 1
# Products of at most 4 * 4 * 32 terms, a dozen one after the other, in float64.
TOLERANCE = 12 * 512 * torch.finfo(torch.float64).eps


def merged_grid(height, width, window=2):
    return -(-height // window), -(-width // window)


def by_hand(vit, x, layer=LAYER):
    """Run an untouched model, with the compressor as a loop over windows."""
    outs, features = vision_transformer.by_hand(vit, x, layer)
    return features, outs


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features(features, fused):
    vit = tiny_vit(**features).double()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    x = images(vit, dtype=torch.float64)
    expected, outs = by_hand(vit, x)
    logits = vit.forward_head(expected)
    assert insert_early_compressor(vit, LAYER) is vit
    assert_close(vit.forward_features(x), expected)
    assert_close(vit(x), logits)

    height, width = vit.patch_embed.dynamic_feat_size(x.shape[-2:])
    last, maps = vit.forward_intermediates(x)
    assert_close(last, expected)
    for index, (actual, out) in enumerate(zip(maps, outs, strict=True)):
        grid = (height, width) if index < LAYER else merged_grid(height, width)
        assert actual.shape == (2, 32, *grid)
        assert_close(actual.flatten(2).transpose(1, 2), out[:, vit.num_prefix_tokens :])


def test_distilled():
    vit = tiny_distilled().double()
    x = images(vit, dtype=torch.float64)
    expected = vit.forward_head(by_hand(vit, x)[0])
    assert_close(insert_early_compressor(vit, LAYER)(x), expected)
    assert type(vit).__name__ == "CompressedVisionTransformerDistilled"


@pytest.mark.parametrize("side", [27, 37, 1, 2])
def test_grids_of_released_models(side):
    vit = tiny_vit(img_size=4 * side, depth=2, class_token=False, global_pool="map").double()
    x = images(vit, 1, torch.float64)
    expected, _ = by_hand(vit, x, 0)
    assert_close(insert_early_compressor(vit, 0).forward_features(x), expected)


def test_default_layer_sees_seven_blocks():
    vit = insert_early_compressor(tiny_vit(depth=8))
    tokens = [y.shape[-1] for y in vit.forward_intermediates(images(vit))[1]]
    assert tokens == [7] * 6 + [4] * 2
    assert hasattr(vit.blocks[6], "compressor")


# Released configurations at a small width, so that their own options are what is tested.
ENTRYPOINTS = (
    "vit_so400m_patch14_siglip_384",
    "vit_base_patch16_siglip_512",
    "vit_large_patch14_clip_336",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch32_clip_448",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_tiny_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256",
    "flexivit_small",
)


@pytest.mark.parametrize("name", ENTRYPOINTS)
def test_released_configurations(name):
    vit = timm.create_model(name, embed_dim=32, depth=3, num_heads=2, img_size=(112, 112))
    vit = vit.double().eval()
    x = images(vit, 1, torch.float64)
    expected, _ = by_hand(vit, x)
    logits = vit.forward_head(expected)
    assert_close(insert_early_compressor(vit, LAYER)(x), logits)


# ---- grids that change from call to call -----------------------------------------------------


SIZES = [(28, 28), (16, 20), (12, 36), (4, 4), (8, 40)]


def test_grid_is_read_at_every_call():
    vit = tiny_vit(dynamic_img_size=True).double()
    plain = copy.deepcopy(vit)
    insert_early_compressor(vit, LAYER)
    for size in SIZES:
        x = images(vit, 1, torch.float64, size)
        assert_close(vit.forward_features(x), by_hand(plain, x)[0])


def test_set_input_size_after_insertion():
    vit = tiny_vit().double()
    plain = copy.deepcopy(vit)
    insert_early_compressor(vit, LAYER)
    for model in (vit, plain):
        model.set_input_size(img_size=(20, 36))
    x = images(vit, dtype=torch.float64)
    assert_close(vit.forward_features(x), by_hand(plain, x)[0])


# ---- intermediates -----------------------------------------------------------------------------


@pytest.fixture
def vit():
    return insert_early_compressor(tiny_vit(reg_tokens=2), LAYER)


def test_intermediates_in_every_form(vit):
    x = images(vit)
    last, maps = vit.forward_intermediates(x)
    assert [tuple(y.shape[2:]) for y in maps] == [(7, 7), (4, 4), (4, 4), (4, 4)]
    assert all(y.is_contiguous() for y in maps)

    _, pairs = vit.forward_intermediates(x, return_prefix_tokens=True)
    for wanted, (y, prefix) in zip(maps, pairs, strict=True):
        assert torch.equal(y, wanted)
        assert prefix.shape == (2, 3, 32)
    only = vit.forward_intermediates(x, [0, -1], intermediates_only=True)
    assert torch.equal(only[0], maps[0])
    assert torch.equal(only[1], maps[3])
    out = vit.forward_intermediates(x, 2, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(out["image_intermediates"][1], maps[3])
    assert torch.equal(out["image_features"], last)
    assert out["image_intermediates_prefix"][0].shape == (2, 3, 32)
    tokens = vit.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for y, wanted in zip(tokens, maps, strict=True):
        assert torch.equal(y, wanted.flatten(2).transpose(1, 2))


def test_intermediates_normed_and_stopped_early(vit):
    x = images(vit)
    normed = vit.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC")
    assert torch.equal(normed[-1], vit.forward_features(x)[:, 3:])
    early = vit.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], vit.forward_intermediates(x)[1][0])


def test_get_intermediate_layers(vit):
    x = images(vit)
    maps = vit.forward_intermediates(x)[1]
    fine, coarse = vit.get_intermediate_layers(x, [0, 2], reshape=True)
    assert torch.equal(fine, maps[0])
    assert torch.equal(coarse, maps[2])
    assert vit.get_intermediate_layers(x, 1)[0].shape == (2, 16, 32)


def test_unknown_output_format_is_timms_error(vit):
    with pytest.raises(AssertionError, match="NCHW or NLC"):
        vit.forward_intermediates(images(vit), output_fmt="NHWC")


@pytest.mark.parametrize("first", ["insert", "wrap"])
def test_features_only(first):
    vit = tiny_vit()
    if first == "insert":
        net = FeatureGetterNet(insert_early_compressor(vit, LAYER), out_indices=(0, 2))
    else:
        net = FeatureGetterNet(vit, out_indices=(0, 2))
        insert_early_compressor(net.model, LAYER)
    maps = net(images(vit))
    assert [tuple(y.shape[2:]) for y in maps] == [(7, 7), (4, 4)]
    assert net.feature_info.reduction() == [4, 8]


def test_features_only_in_front_of_the_compressor():
    net = FeatureGetterNet(insert_early_compressor(tiny_vit(), 2), out_indices=(0, 1))
    assert [tuple(y.shape[2:]) for y in net(images(net.model))] == [(7, 7), (7, 7)]


# ---- training ----------------------------------------------------------------------------------


def gradients(vit, *batches):
    vit.zero_grad()
    sum(vit(x).square().sum() for x in batches).backward()
    return {name: p.grad for name, p in vit.named_parameters()}


def test_every_parameter_gets_a_gradient():
    vit = insert_early_compressor(tiny_vit(init_values=0.3, qk_norm=True, reg_tokens=2), LAYER)
    assert all(grad is not None for grad in gradients(vit.train(), images(vit)).values())


def test_gradient_checkpointing():
    # Several forward passes before one backward pass, two of them with 16 tokens on other grids.
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER).train()
    batches = [images(vit, size=size) for size in ((16, 16), (8, 32), (28, 28))]
    wanted = gradients(vit, *batches)
    vit.set_grad_checkpointing()
    actual = gradients(vit, *batches)
    assert all(torch.equal(actual[name], grad) for name, grad in wanted.items())


def test_checkpoint_around_the_model():
    vit = insert_early_compressor(tiny_vit(), LAYER).train()
    x = images(vit).requires_grad_()
    (wanted,) = torch.autograd.grad(vit.forward_features(x).sum(), x)
    for use_reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(vit.forward_features, x, use_reentrant=use_reentrant)
        x.grad = None
        y.sum().backward()
        assert torch.equal(x.grad, wanted)


def test_drop_path_in_training():
    vit = insert_early_compressor(tiny_vit(drop_path_rate=0.5), LAYER).train()
    x = images(vit)
    assert not torch.equal(vit(x), vit(x))
    vit.eval()
    assert torch.equal(vit(x), vit(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    vit = insert_early_compressor(tiny_vit(init_values=0.3), LAYER).to(dtype)
    assert vit.forward_features(images(vit, dtype=dtype)).dtype == dtype
    late = insert_early_compressor(tiny_vit().to(dtype), LAYER)
    assert {p.dtype for p in late.parameters()} == {dtype}


def test_autocast(vit):
    with torch.autocast("cpu", torch.bfloat16):
        assert vit(images(vit)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*Conv2d:UserWarning")
def test_empty_batch(vit):
    assert vit.forward_features(torch.zeros(0, 3, 28, 28)).shape == (0, 3 + 16, 32)


def test_head_can_be_replaced(vit):
    vit.reset_classifier(3)
    assert vit(images(vit)).shape == (2, 3)
    assert isinstance(vit.head, nn.Linear)
