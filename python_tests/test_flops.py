# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.flops`` against PyTorch's own counter and hand counts; what it refuses."""

import pytest
import timm
import torch
from families.vision_transformer import make as tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uhd_ops import _native, flops
from uhd_ops.flops import (
    SIGLIP_SO400M,
    CompressorConfig,
    ConnectorConfig,
    ViTConfig,
    count_vit,
)
from uhd_ops.nn import ABLATION
from uhd_ops.retrofit import insert_early_compressor, insert_progressive_compression

SLICE = [(70, 70)]  # 980x980 px, for which the paper states its numbers


def test_by_hand():
    """One block of width 2, one hidden channel, on a 2x3 view whose right windows are ragged."""
    vit = ViTConfig(dim=2, depth=1, heads=1, mlp_hidden=1, patch=1, in_channels=1)
    report = count_vit(vit, [(2, 3)], CompressorConfig(0))
    assert report["patch_embed"].linear == 6 * 2
    assert report["blocks.0"].linear == 6 * (4 * 4 + 2 * 2)
    assert report["blocks.0"].attention == 2 * 36 * 2
    # Windows of 4 and of 2 tokens: 16 + 4 pairs. Two merged tokens: fc1 (4, 8), fc2 (2, 4).
    assert report["compressor"].attention == 2 * 20 * 2
    assert report["compressor"].linear == 6 * 4 * 4 + 2 * (4 * 8 + 2 * 4)
    assert report.total == sum(layer.total for layer in report.layers)


@pytest.mark.parametrize(("form", "per_window"), [("dense", 20), ("block", 8), ("tied", 5)])
def test_reused_mlp_forms(form, per_window):
    vit = ViTConfig(dim=6, depth=2, heads=2, mlp_hidden=5, patch=2)
    compressor = CompressorConfig(1, attention="none", form=form)
    report = count_vit(vit, [(4, 6), (3, 5)], compressor)
    assert report["compressor"].linear == (6 + 6) * per_window * 6 * 5
    assert report["compressor"].attention == 0


def test_views_attend_inside_themselves():
    vit = ViTConfig(dim=6, depth=2, heads=2, mlp_hidden=5, patch=2, prefix_tokens=3)
    parts = [count_vit(vit, [grid], CompressorConfig(0)).total for grid in [(4, 6), (3, 5)]]
    assert count_vit(vit, [(4, 6), (3, 5)], CompressorConfig(0)).total == sum(parts)
    assert count_vit(vit, []).total == 0


def count_forward(vit, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit.forward_features(image)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "test_vit"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_flop_counter_on_timm(name, fused):
    with torch.device("meta"):
        vit = timm.create_model(name, img_size=112).eval()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    grid = vit.patch_embed.grid_size
    counted = count_forward(vit, torch.empty(1, 3, 112, 112, device="meta"))
    assert counted == 2 * flops.of_vit(vit, [grid]).total


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
@pytest.mark.parametrize("ablation", ABLATION)
def test_equals_the_flop_counter_with_a_compressor(ablation, form, monkeypatch):
    """From the sizes; the counter sees the definitions of the operators, not the formulas."""
    monkeypatch.setattr(_native, "has_kernels", lambda device: False)
    vit = timm.create_model("test_vit", img_size=64).eval()
    options = {**ABLATION[ablation], "form": form}
    insert_early_compressor(vit, 1, **options)
    report = flops.of_vit(vit, [(4, 4)])
    with sdpa_kernel(SDPBackend.MATH):  # the counter has no formula for the fused one of the CPU
        assert count_forward(vit, torch.randn(1, 3, 64, 64)) == 2 * report.total
    assert flops.compressor_config(vit) == CompressorConfig(1, **options)
    traced = flops.count_forward(vit.forward_features, torch.empty(1, 3, 64, 64))
    rows = [(row.name, row.linear, row.attention) for row in report.layers]
    assert rows == [(row.name, row.linear, row.attention) for row in traced.layers[:-1]]


@pytest.mark.parametrize("pool", ["adaptive", "mean", "unshuffle"])
@pytest.mark.parametrize("layers", [(1,), (0, 2, 3)])
def test_equals_the_flop_counter_with_progressive_compression(pool, layers):
    flops.register_formulas()
    vit = insert_progressive_compression(tiny_vit(img_size=32), layers, pool=pool, hidden_dim=24)
    report = flops.of_vit(vit, [(8, 8)])
    with sdpa_kernel(SDPBackend.MATH):
        assert count_forward(vit, torch.randn(1, 3, 32, 32)) == 2 * report.total
    traced = flops.count_forward(vit.forward_features, torch.empty(1, 3, 32, 32))
    assert report.layers[1:] == traced.layers[1:-1]
    expected = CompressorConfig(layers, pool=pool, hidden_dim=24)
    assert flops.compressor_config(vit) == expected


def test_report():
    compressor = CompressorConfig(3)
    report = count_vit(SIGLIP_SO400M, SLICE, compressor, counting="paper")
    names = [layer.name for layer in report.layers]
    assert names[:6] == [
        "patch_embed",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.3",
        "compressor",
    ]
    assert len(names) == 29
    assert [report[name].tokens for name in names[4:7]] == [4900, 4900, 1225]
    data = report.to_dict()
    assert data["total"] == sum(row["total"] for row in data["layers"]) == report.total
    lines = str(report).splitlines()
    assert len(lines) == 31
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["total", "1245.1376"]
    with pytest.raises(KeyError, match=r"blocks\.99"):
        report["blocks.99"]


SIZES = {"dim": 6, "depth": 2, "heads": 2, "mlp_hidden": 5, "patch": 2}
CONFIGS = {
    "vit": lambda **change: ViTConfig(**{**SIZES, **change}),
    "compressor": CompressorConfig,
    "pool": lambda **change: CompressorConfig(**{"layers": (3,), "pool": "mean", **change}),
    "connector": lambda **change: ConnectorConfig(**{"out_dim": 64, **change}),
}
CROSS = 'mlp must be "reuse" or "none" with attention=\'cross_mean\', got "plain"'
ATTENTIONS = '"window", "none", "cross_top_left" or "cross_mean"'
BAD_CONFIGS = {
    ("vit", ValueError): [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 7}, "dim must be a multiple of heads, got dim = 7 and heads = 2"),
        ({"prefix_tokens": -1}, "prefix_tokens must be at least 0, got -1"),
    ],
    ("vit", TypeError): [
        ({"depth": 2.0}, "depth must be an int, got float"),
        ({"heads": True}, "heads must be an int, got bool"),
    ],
    ("compressor", ValueError): [
        ({"layers": -1}, "layer must be at least 0, got -1"),
        ({"layers": (3, 17)}, r"layers must be one without pool, got \(3, 17\)"),
        ({"form": "sparse"}, 'form must be "dense", "block" or "tied", got \'sparse\''),
        ({"attention": "full"}, f"attention must be {ATTENTIONS}, got 'full'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"hidden_dim": 8}, "hidden_dim must be None without pool, got 8"),
        ({"positions": "here"}, 'positions must be "center" or "reindex", got \'here\''),
        ({"attention": "cross_mean", "mlp": "plain"}, CROSS),
    ],
    ("pool", ValueError): [
        ({"layers": (-1,)}, r"layers\[0\] must be at least 0, got -1"),
        ({"layers": (3, 3)}, r"layers must ascend, with at least one, got \(3, 3\)"),
        ({"pool": "max"}, "pool must be \"adaptive\", .* got 'max'"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"form": "tied"}, "form must be left out with pool='mean', got 'tied'"),
    ],
    ("pool", TypeError): [
        ({"layers": (1.0,)}, r"layers\[0\] must be an int, got float"),
        ({"layers": 3}, "layers must be a sequence of ints, got int"),
    ],
    ("connector", ValueError): [({"merger_times": 0}, "merger_times must be at least 1, got 0")],
}


@pytest.mark.parametrize(
    ("config", "error", "change", "message"),
    [(*key, *row) for key, rows in BAD_CONFIGS.items() for row in rows],
)
def test_bad_configs(config, error, change, message):
    with pytest.raises(error, match=f"^{message}$"):
        CONFIGS[config](**change)


def test_bad_calls():
    vit = ViTConfig(dim=6, depth=2, heads=2, mlp_hidden=5, patch=2)
    with pytest.raises(ValueError, match=r"^counting must be one of \('macs', 'paper'\), got 'x'$"):
        count_vit(vit, [(2, 2)], counting="x")
    message = "compressor.layers must be below the depth of the encoder, 2, got \\(2,\\)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        count_vit(vit, [(2, 2)], CompressorConfig(2))
    with pytest.raises(TypeError, match=r"^compressor\[0\] must be a CompressorConfig, got int"):
        count_vit(vit, [(2, 2)], [3])
    with pytest.raises(ValueError, match=r"^compressor\[1\]\.layers must differ from those before"):
        count_vit(vit, [(2, 2)], [CompressorConfig(0), CompressorConfig((0, 1), pool="mean")])
    with pytest.raises(NotImplementedError, match=r"^vit must tell the side of its patches"):
        flops.of_vit(torch.nn.Linear(2, 2), [(2, 2)])
    with pytest.raises(NotImplementedError, match=r'^counting must be "macs" without full_window'):
        flops.of_vit(torch.nn.Linear(2, 2), [(2, 2)], counting="paper")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "vit must be a plain timm VisionTransformer, got ResNet"),
        ("beit_base_patch16_224", "vit must be a plain timm VisionTransformer, got Beit"),
        ("vit_giant_patch14_dinov2", "vit must have blocks with the matrices"),
        ("vitamin_small_224", "vit must be a plain timm VisionTransformer, got VisionTransformer:"),
        ("vit_tiny_r_s16_p8_224", "vit must embed square patches with one convolution"),
    ],
)
def test_not_plain(name, message):
    with torch.device("meta"):
        vit = timm.create_model(name)
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        flops.vit_config(vit)


def test_not_plain_attention():
    vit = tiny_vit(attn_layer="diff")
    with pytest.raises(NotImplementedError, match=r"^vit must have blocks with timm's Attention"):
        flops.vit_config(vit)
