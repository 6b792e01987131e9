# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.flops`` against the published numbers of LLaVA-UHD v3 and v4."""

import dataclasses

import pytest

from uhd_ops import flops
from uhd_ops.flops import (
    SIGLIP_SO400M,
    CompressorConfig,
    ConnectorConfig,
    ViTConfig,
    count_vit,
)
from uhd_ops.nn import ABLATION


@pytest.mark.parametrize("row", flops.PAPER_ROWS, ids=lambda row: f"{row.table}: {row.name}")
def test_paper_counting_reproduces_the_tables(row):
    assert abs(row.difference) <= 0.05  # the tables have one decimal
    assert row.difference == row.computed - row.published


def test_paper_rows_are_the_ablation():
    """The rows count what the options of the same name insert."""
    variants = {row.name: row.compressor for row in flops.PAPER_ROWS if row.table == "4, A3"}
    assert variants.pop("post-ViT baseline") is None
    assert variants == {name: CompressorConfig(**options) for name, options in ABLATION.items()}
    layers = {row.name: row.compressor for row in flops.PAPER_ROWS if row.table == "5"}
    assert layers == {f"after layer {k}": CompressorConfig(k) for k in (3, 6, 9, 15)}


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


# With and without block or tied weights: counted by hand from the sizes of the layers.
CORRECTED = {
    (70, 70): (1573.10, 1516.29, 1443.40, 1425.18, 1502.45, 1429.57, 1411.35),
    (32, 32): (241.81, 239.33, 224.10, 220.29, 238.54, 223.31, 219.50),
}


@pytest.mark.parametrize("grid", CORRECTED)
def test_corrected_totals(grid):
    variants = flops.paper_totals(grid)
    assert tuple(round(v.giga, 2) for v in variants) == CORRECTED[grid]
    without = {(70, 70): (3555.07, 3511.18), (32, 32): (489.17, 486.86)}[grid]
    assert [round(v.without, 2) for v in variants] == [without[0]] * 4 + [without[1]] * 3
    saved = {(70, 70): "55.8%", (32, 32): "50.6%"}[grid]
    assert f"{variants[0].saved:.1%}" == saved


@pytest.mark.parametrize(
    ("compressor", "merger_times", "full", "expected"),
    [
        (None, 2, None, 498.54),
        (CompressorConfig(), 1, None, 244.38),
        (CompressorConfig(), 1, False, 241.90),
        (CompressorConfig(form="tied"), 1, False, 222.86),
    ],
)
def test_connector(compressor, merger_times, full, expected):
    """With the connector to a language model of width 4096, at 448x448 px."""
    report = count_vit(
        SIGLIP_SO400M,
        [(32, 32)],
        compressor,
        connector=ConnectorConfig(4096, merger_times),
        counting="paper",
        full_window_attention=full,
    )
    assert round(report.giga, 2) == expected
    assert report.layers[-1].name == "connector"


@pytest.mark.parametrize(
    ("layers", "patch", "grid", "released", "ours"),
    [
        ((3, 17), 10, (100, 100), 2412, 2400),
        ((4, 18), 10, (100, 100), 2784, 2772),
        ((), 14, (72, 72), 3806, 3806),
    ],
)
def test_progressive_compression(layers, patch, grid, released, ours):
    """ViT-UHD of LLaVA-UHD v3, first merge after 4 or after 5 blocks, and MoonViT at 1024 px."""
    vit = dataclasses.replace(SIGLIP_SO400M, patch=patch)
    pools = CompressorConfig(layers, pool="adaptive") if layers else None
    report = count_vit(vit, [grid], pools, concatenate=True)
    assert round(report.giga) == released
    tokens = grid[0] * grid[1]
    for index, layer in enumerate(layers):
        row = report[f"compressors.{index}"]
        assert (row.tokens, row.linear) == (tokens, 3 * tokens * 1152**2)
        assert report[f"blocks.{layer}"].tokens == tokens
        tokens //= 4
        assert report[f"blocks.{layer + 1}"].tokens == tokens
    assert round(count_vit(vit, [grid], pools).giga) == ours


def test_pools_by_hand():
    """A 3x4 view merged to 2x2 and to 1x1."""
    vit = ViTConfig(dim=2, depth=3, heads=1, mlp_hidden=1, patch=1, in_channels=1)

    def rows(*pools, counting="paper", **options):
        pools = [CompressorConfig((layer,), pool=pool, hidden_dim=j) for layer, pool, j in pools]
        report = count_vit(vit, [(3, 4)], pools, counting=counting, **options)
        assert [row.name for row in report.layers[1:]] == [
            *("blocks.0", "compressors.0", "blocks.1", "compressors.1", "blocks.2"),
        ]
        assert [row.tokens for row in report.layers] == [12, 12, 12, 4, 4, 1]
        return report["compressors.0"], report["compressors.1"]

    first, second = rows((1, "mean", None), (0, "adaptive", 5))
    assert first.linear == 12 * (2 * 5 + 5 * 2) + 4 * 2 * 5
    # Activations; scale and softmax, and the terms of both means, per channel.
    assert first.elementwise == 12 * (5 + (4 + 1 + 1) * 2)
    assert (second.linear, second.attention, second.elementwise) == (0, 0, 4 * 2)
    first, second = rows((0, "adaptive", None), (1, "unshuffle", 3), concatenate=True)
    assert first.linear == 12 * (4 * 2 + 2 * 2)
    assert (second.linear, second.elementwise) == (4 * 2 * 3 + 3 * 2, 3)
    assert rows((0, "adaptive", None), (1, "adaptive", None), counting="macs")[0].elementwise == 0


def test_v3_rows():
    """All but MoonViT by hand: 2 x 2 windows, C = 1152, I = 4304, 27 blocks."""
    moonvit, *rows = flops.v3_rows(1024)
    assert (moonvit.patch, moonvit.grid, moonvit.layers) == (14, (72, 72), ())
    assert round(moonvit.released) == round(moonvit.computed) == 3806
    assert [row.patch for row in rows] == [p for p in (16, 12, 10, 8) for _ in range(4)]
    assert [row.merges for row in rows[:4]] == ["none", "4-18", "5-19", "4-18-27"]
    c, i = 1152, 4304
    for row in rows:
        unit = row.patch * 2 ** max(1, len(row.layers))
        assert row.grid[0] * row.patch == 1024 // unit * unit
        n = row.tokens
        released, computed = [n * c * 3 * row.patch**2] * 2
        for block in range(27):
            total = n * (4 * c * c + 2 * c * i) + 2 * n * n * c
            released, computed = released + total, computed + total
            if block in row.layers:
                released, computed = released + 3 * n * c * c, computed + (2 * n + n // 4) * c * c
                n //= 4
        assert n == row.merged_tokens
        assert row.released == pytest.approx(released / 1e9, rel=1e-12)
        assert row.computed == pytest.approx(computed / 1e9, rel=1e-12)


@pytest.mark.parametrize("side", flops.PUBLISHED_TOKENS)
def test_v3_tokens(side):
    """The published numbers are areas over 1600; whole windows of 40 px are a little fewer."""
    assert flops.PUBLISHED_TOKENS[side] == side**2 // 1600
    row = next(r for r in flops.v3_rows(side) if (r.patch, r.merges) == (10, "4-18"))
    assert row.merged_tokens == (side // 40) ** 2


def test_v3_refuses():
    with pytest.raises(ValueError, match="side must be at least 128, got 127"):
        flops.v3_rows(127)
    with pytest.raises(TypeError, match="side must be an int"):
        flops.v3_rows(1024.0)
    assert all(row.merged_tokens >= 1 for row in flops.v3_rows(128))
