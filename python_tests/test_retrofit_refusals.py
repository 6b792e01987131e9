# SPDX-License-Identifier: Apache-2.0
"""What the retrofit does not understand it refuses, and nothing has changed then."""

import pytest
import timm
import torch
from families import eva
from families.case import random_images as images
from families.case import snapshot
from families.vision_transformer import make as tiny_vit
from timm.layers import GatedMlp, PatchEmbed, SimpleNorm
from timm.models._features import FeatureGetterNet
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uhd_ops import insert_early_compressor, remove_early_compressor

LAYER = 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": 4}, ValueError, r"layer must be in 0\.\.3 for a model of 4 blocks, got 4"),
        ({}, ValueError, r"layer must be in 0\.\.3 for a model of 4 blocks, got 6"),
        ({"layer": True}, TypeError, "layer must be an int, got bool"),
        ({"layer": 1.0}, TypeError, "layer must be an int, got float"),
        ({"layer": 1, "attention": 1}, TypeError, "attention must be a bool or a str, got int"),
        ({"layer": 1, "mlp": "random"}, ValueError, 'mlp must be "reuse", "plain" or "none"'),
        ({"layer": 1, "form": "thin"}, ValueError, 'form must be "dense", "block" or "tied"'),
        ({"layer": 1, "window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"layer": 1, "window": 2.0}, TypeError, "window must be an int, got float"),
    ],
)
def test_bad_arguments(options, error, message):
    vit = tiny_vit()
    before = snapshot(vit)
    with pytest.raises(error, match=message):
        insert_early_compressor(vit, **options)
    assert snapshot(vit) == before


class NoGrid(PatchEmbed):
    def dynamic_feat_size(self, img_size):
        return 1, 1


class OwnPositions(Eva):
    def _pos_embed(self, x):
        return super()._pos_embed(x)


class OwnForward(VisionTransformer):
    def forward_features(self, x, **options):
        return super().forward_features(x, **options)


def small(name):
    with torch.device("meta"):
        return timm.create_model(name)


REFUSED = {
    "TNT": (
        lambda: small("tnt_s_legacy_patch16_224"),
        r"every patch token is tied .*, so vit takes no compressor; got timm\.models\.tnt\.TNT\.",
    ),
    "MlpMixer": (lambda: small("mixer_s32_224"), "^it mixes tokens by weights for a"),
    "CrossVit": (lambda: small("crossvit_9_240"), "^two branches of different patch"),
    "VOLO": (lambda: small("volo_d1_224"), "^it reduces its tokens behind the outlook"),
    "PiT": (lambda: small("pit_ti_224"), "^it pools its tokens"),
    "XCiT": (lambda: small("xcit_nano_12_p16_224"), "^it attends between channels and"),
    "ConViT": (lambda: small("convit_tiny"), "^its positional attention takes square"),
    "Swin": (
        lambda: small("swin_tiny_patch4_window7_224"),
        "^its stages reduce the resolution already, so vit takes .*SwinTransformer",
    ),
    "ResNet": (lambda: small("resnet18"), "^its stages reduce the resolution already, .*ResNet"),
    "no vision model": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
        r"^vit is of no class .*Sequential\. docs/.* docs/own_vit\.md",
    ),
    "features_only": (
        lambda: FeatureGetterNet(tiny_vit(), out_indices=(1,)),
        r"its 'model' is one: pass that; got timm\.models\._features\.FeatureGetterNet",
    ),
    "compiled": (
        lambda: torch.compile(tiny_vit()),
        r"its '_orig_mod' is one: pass that; got torch\._dynamo\.eval_frame\.OptimizedModule",
    ),
    "gated MLP": (lambda: tiny_vit(mlp_layer=GatedMlp), "block.mlp must be Mlp or .* got GatedMlp"),
    "norm without weights": (
        lambda: tiny_vit(norm_layer=SimpleNorm),
        "block.norm1 must be LayerNorm or .*, got SimpleNorm",
    ),
    "stem without a grid": (
        lambda: tiny_vit(embed_layer=NoGrid),
        "vit.patch_embed must tell its patch grid by dynamic_feat_size, .* NoGrid does not",
    ),
    "own positions": (
        lambda: OwnPositions(**eva.SIZE),
        r"vit must leave Eva\._pos_embed as it is",
    ),
    "own forward": (
        lambda: tiny_vit(OwnForward),
        "leave VisionTransformer.forward_features as it is, but OwnForward replaces it",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_other_models(make, message):
    vit = make()
    before = list(vit.state_dict()), repr(vit)
    with pytest.raises(NotImplementedError, match=message):
        insert_early_compressor(vit, 1)
    assert (list(vit.state_dict()), repr(vit)) == before


def test_patched_instance():
    vit = tiny_vit()
    vit.forward_features = lambda x: x
    with pytest.raises(NotImplementedError, match=r"leave VisionTransformer\.forward_features"):
        insert_early_compressor(vit, LAYER)


@pytest.mark.parametrize("function", [insert_early_compressor, remove_early_compressor])
def test_no_module(function):
    with pytest.raises(TypeError, match=r"vit must be a torch.nn.Module, got str"):
        function("vit_tiny_patch16_224")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("wrap", [lambda vit: vit, FeatureGetterNet, nn.Sequential])
def test_graphs_without_sizes_are_refused(wrap):
    vit = wrap(insert_early_compressor(tiny_vit(), LAYER))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile Compressed"):
        torch.jit.script(vit)
    with pytest.raises(NotImplementedError, match=r"x must not be a torch\.fx\.Proxy in a model"):
        torch.fx.symbolic_trace(vit)


def test_blocks_outside_the_model():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    with pytest.raises(RuntimeError, match="the patch grid of these tokens is not known"):
        vit.blocks(torch.zeros(1, 50, 32))


def test_other_number_of_tokens():
    vit = insert_early_compressor(tiny_vit(), LAYER)
    vit.blocks[0].register_forward_hook(lambda block, args, out: out[:, :-1])
    with pytest.raises(
        ValueError, match=r"1 prefix tokens and 7 x 7 patches, 50 tokens, got shape \(2, 49, 32\)"
    ):
        vit(images(vit))
