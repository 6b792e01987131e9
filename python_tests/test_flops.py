# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.flops`` against the paper's tables, PyTorch's own counter, and hand counts."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from uhd_ops import _native, flops
from uhd_ops.flops import SIGLIP_SO400M, CompressorConfig, ViTConfig, count_vit
from uhd_ops.retrofit import insert_early_compressor

SLICE = [(70, 70)]  # 980x980 px, for which the paper states its numbers

# LLaVA-UHD v4: table 4, and the ablation of the layer; 1e9 operations.
PAPER = [
    (None, 3555.1),
    (CompressorConfig(attention=None, mlp=None), 1368.7),
    (CompressorConfig(attention=None, mlp="plain"), 1401.2),
    (CompressorConfig(attention=None), 1490.2),
    (CompressorConfig(attention="cross"), 1402.0),
    (CompressorConfig(mlp="plain"), 1484.1),
    (CompressorConfig(), 1573.1),
    (CompressorConfig(layer=3), 1245.1),
    (CompressorConfig(layer=9), 1901.1),
    (CompressorConfig(layer=15), 2557.0),
]


@pytest.mark.parametrize(("compressor", "expected"), PAPER)
def test_paper_counting_reproduces_the_tables(compressor, expected):
    report = count_vit(SIGLIP_SO400M, SLICE, compressor, counting="paper")
    assert report.giga == pytest.approx(expected, abs=0.05)  # the tables have one decimal


# Counted by FlopCounterMode on transformers' vision tower of MiniCPM-V 4.6, halved.
@pytest.mark.parametrize(
    ("side", "compressor", "expected"),
    [
        (70, None, 3511.1785),
        (70, CompressorConfig(), 1502.4538),
        (32, None, 486.8596),
        (32, CompressorConfig(), 238.5390),
    ],
)
def test_macs_of_the_released_tower(side, compressor, expected):
    assert round(count_vit(SIGLIP_SO400M, [(side, side)], compressor).giga, 4) == expected


@pytest.mark.parametrize(
    ("form", "full", "expected"),
    [
        ("dense", True, 1573.10),
        ("dense", False, 1516.29),
        ("tied", True, 1481.99),
        ("tied", False, 1425.18),
    ],
)
def test_true_windows_and_tied_weights(form, full, expected):
    compressor = CompressorConfig(form=form)
    report = count_vit(
        SIGLIP_SO400M, SLICE, compressor, counting="paper", full_window_attention=full
    )
    assert round(report.giga, 2) == expected


def test_by_hand():
    """One block of width 2, one hidden channel, on a 2x3 view whose right windows are ragged."""
    vit = ViTConfig(dim=2, depth=1, heads=1, mlp_hidden=1, patch=1, in_channels=1)
    report = count_vit(vit, [(2, 3)], CompressorConfig(layer=0))
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
    compressor = CompressorConfig(layer=1, attention=None, form=form)
    report = count_vit(vit, [(4, 6), (3, 5)], compressor)
    assert report["compressor"].linear == (6 + 6) * per_window * 6 * 5
    assert report["compressor"].attention == 0


def test_views_attend_inside_themselves():
    vit = ViTConfig(dim=6, depth=2, heads=2, mlp_hidden=5, patch=2, prefix_tokens=3)
    parts = [count_vit(vit, [grid], CompressorConfig(layer=0)).total for grid in [(4, 6), (3, 5)]]
    assert count_vit(vit, [(4, 6), (3, 5)], CompressorConfig(layer=0)).total == sum(parts)
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
@pytest.mark.parametrize("attention", [True, False])
def test_equals_the_flop_counter_with_a_compressor(form, attention, monkeypatch):
    # The counter does not see into our kernels; it does see the reference's matrix products.
    monkeypatch.setattr(_native, "has_kernels", lambda device: False)
    vit = timm.create_model("test_vit", img_size=64).eval()
    insert_early_compressor(vit, 1, form=form, attention=attention)
    for block in vit.blocks:
        block.attn.fused_attn = False
    report = flops.of_vit(vit, [vit.patch_embed.grid_size])
    assert count_forward(vit, torch.randn(1, 3, 64, 64)) == 2 * report.total
    assert flops.compressor_config(vit) == CompressorConfig(
        layer=1, form=form, attention="window" if attention else None
    )


def test_report():
    compressor = CompressorConfig(layer=3)
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 7}, ValueError, "dim must be a multiple of heads, got dim = 7 and heads = 2"),
        ({"depth": 2.0}, TypeError, "depth must be an int, got float"),
        ({"heads": True}, TypeError, "heads must be an int, got bool"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens must be at least 0, got -1"),
    ],
)
def test_bad_vit_config(change, error, message):
    sizes = {"dim": 6, "depth": 2, "heads": 2, "mlp_hidden": 5, "patch": 2}
    with pytest.raises(error, match=f"^{message}$"):
        ViTConfig(**{**sizes, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": -1}, "layer must be at least 0, got -1"),
        ({"form": "sparse"}, r"form must be one of \('dense', 'block', 'tied'\), got 'sparse'"),
        (
            {"attention": "full"},
            r"attention must be one of \(None, 'window', 'cross'\), got 'full'",
        ),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_bad_compressor_config(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        CompressorConfig(**change)


def test_bad_calls():
    vit = ViTConfig(dim=6, depth=2, heads=2, mlp_hidden=5, patch=2)
    with pytest.raises(ValueError, match=r"^counting must be one of \('macs', 'paper'\), got 'x'$"):
        count_vit(vit, [(2, 2)], counting="x")
    message = "compressor.layer must be below the depth of the encoder, 2, got 2"
    with pytest.raises(ValueError, match=f"^{message}$"):
        count_vit(vit, [(2, 2)], CompressorConfig(layer=2))
    with pytest.raises(NotImplementedError, match=r"^vit must be a plain timm VisionTransformer"):
        flops.of_vit(torch.nn.Linear(2, 2), [(2, 2)])
    with torch.device("meta"):
        swiglu = timm.create_model("vit_giant_patch14_dinov2")
    with pytest.raises(NotImplementedError, match=r"^vit must have blocks with the matrices"):
        flops.of_vit(swiglu, [(2, 2)])
