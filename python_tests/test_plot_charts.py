# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.plot``: the lengths of bars, the places of points, and what is written at them."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import uhd_ops
from uhd_ops import flops, plot
from uhd_ops.plot import figures

SIGLIP = flops.SIGLIP_SO400M


@pytest.fixture
def axes():
    return Figure().subplots()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (999.9, "1 ks"),
        (12.34, "12.3 s"),
        (0.004_81, "4.81 ms"),
        (-2e-5, "-20 µs"),
        (1.591e9, "1.59 Gs"),
        (7e16, "7e+04 Ts"),
        (1e-12, "0.001 ns"),
    ],
)
def test_numbers_with_units(value, text):
    assert plot.readable(value, "s") == text


def test_saved_in_words():
    assert figures.saved(4, 1) == "75.0% saved"
    assert figures.saved(3, 3) == "0.0% saved"
    assert figures.saved(2, 5.666) == "2.83 times as much"


@pytest.mark.parametrize("sizes", [SIGLIP, flops.ViTConfig(8, 4, 2, 16, 4)], ids=["large", "tiny"])
def test_layers(sizes, axes):
    grids, layer = [(32, 32)], 1
    without = flops.count_vit(sizes, grids)
    report = flops.count_vit(sizes, grids, flops.CompressorConfig(layer))
    plot.layers(report, without, axes=axes)
    names = [row.name for row in report.layers]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    before = {row.name: row.total for row in without.layers}
    grey, blue, orange = axes.containers
    assert [bar.get_height() for bar in grey] == [before.get(name, 0) for name in names]
    assert [bar.get_height() for bar in orange] == [report["compressor"].total]
    places = [round(bar.get_x() + bar.get_width() / 2) for bar in (*blue, *orange)]
    heights = dict(zip(places, (bar.get_height() for bar in (*blue, *orange)), strict=True))
    assert [heights[place] for place in range(len(names))] == [r.total for r in report.layers]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["without compression", "with compression", "compressor"]
    prefix = "G" if sizes is SIGLIP else "M"
    assert f" {prefix}MACs to " in axes.get_title()
    axes.figure.canvas.draw()
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert any(tick.endswith("MACs") and float(tick.split()[0]) > 0 for tick in ticks)


def test_costs(axes):
    lines = {"a": [(200, 3e6), (400, 5e9)], "b": [(200, 4e6), (400, 4e9)]}
    plot.costs(lines, colors={"b": "red"}, marks=[("b to a", 250, 8e8)], axes=axes)
    first, second, ring = axes.lines
    assert first.get_xydata().tolist() == [list(point) for point in lines["a"]]
    assert second.get_xydata().tolist() == [list(point) for point in lines["b"]]
    assert second.get_color() == "red"
    assert first.get_marker() != second.get_marker()
    assert ring.get_xydata().tolist() == [[250, 8e8]]
    assert {text.get_text() for text in axes.texts} == {"1", "1: b to a"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    axes.figure.canvas.draw()
    ticks = {label.get_text() for label in axes.get_yticklabels()}
    assert {"5 MMACs", "1 GMACs"} <= ticks
    assert "200" in {label.get_text() for label in axes.get_xticklabels()}


def test_bars(axes):
    series = {"old": [1.0, 2.0], "new": [3.0, 4.0]}
    plot.bars(["x", "y"], series, texts={"old": ["a", "b"], "new": ["c", "d"]}, axes=axes)
    assert [[bar.get_width() for bar in drawn] for drawn in axes.containers] == [[1, 2], [3, 4]]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c", "d"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
    middles = [bar.get_y() + bar.get_height() / 2 for drawn in axes.containers for bar in drawn]
    assert middles == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert axes.yaxis_inverted()


def test_timings():
    cases = {"forward": {"uhd_ops": 0.002, "SDPA": 0.005}, "tiny": {"uhd_ops, tied": 1.0}}
    with pytest.raises(ValueError, match=r"cases\['tiny'\] must have the variant 'uhd_ops', got"):
        plot.timings(cases, figure=Figure())
    cases["tiny"]["uhd_ops"] = 0.5
    figure = plot.timings(cases, figure=Figure())
    forward, tiny = figure.axes
    assert [text.get_text() for text in forward.texts] == ["2 ms, 1.00x", "5 ms, 2.50x"]
    assert [text.get_text() for text in tiny.texts] == ["1 s, 2.00x", "500 ms, 1.00x"]
    ours = {bar.get_facecolor() for bar in tiny.patches}
    assert len(ours) == 1
    assert {bar.get_facecolor() for bar in forward.patches} > ours


def test_agreement():
    rows = [("a", 100.0, 100.03), ("b", 50.0, 49.9)]
    figure = plot.agreement(rows, rounding=0.05, unit="ops", figure=Figure())
    left, right = figure.axes
    published, computed = left.collections
    assert published.get_offsets().tolist() == [[100, 0], [50, 1]]
    assert np.allclose(computed.get_offsets(), [[100.03, 0], [49.9, 1]])
    assert np.allclose(right.collections[1].get_offsets(), [[0.03, 0], [-0.1, 1]])
    (band,) = right.patches
    extent = band.get_extents().transformed(right.transData.inverted())
    assert (extent.x0, extent.x1) == pytest.approx((-0.05, 0.05))
    assert right.get_xlim()[0] < -0.1 < 0.1 < right.get_xlim()[1]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b"]
    assert not any(label.get_visible() for label in right.get_yticklabels())
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["published", "computed"], ["rounding, ±0.05"]]


@pytest.mark.parametrize(
    "compressor",
    [None, flops.CompressorConfig((3, 17), pool="adaptive")],
    ids=["early", "progressive"],
)
def test_diagram(compressor):
    plan = uhd_ops.plan_slices(1800, 1200)
    figure = plot.diagram(
        Image.new("RGB", (1800, 1200)), plan, compressor=compressor, figure=Figure()
    )
    slices, pack, compress = figure.axes
    config = flops.CompressorConfig() if compressor is None else compressor
    without, report = (
        flops.count_vit(SIGLIP, plan.grids),
        flops.count_vit(SIGLIP, plan.grids, config),
    )
    assert len(slices.images) == len(pack.images) == plan.num_views == 9
    boxes = [shown.get_extent() for shown in slices.images]
    for (l1, r1, b1, t1), (l2, r2, b2, t2) in itertools.combinations(boxes, 2):
        assert r1 < l2 or r2 < l1 or b1 < t2 or b2 < t1  # no picture lies on another
    widths = [
        (right - left) * plan.num_tokens
        for left, right, *_ in (shown.get_extent() for shown in pack.images)
    ]
    assert widths == pytest.approx([h * w for h, w in plan.grids])
    rows, count = report.layers[1:], len(report.layers) - 1
    heights = [bar.get_height() for bar in compress.patches]
    assert heights[count:] == [row.total for row in rows]
    before = {row.name: row.total for row in without.layers}
    assert heights[:count] == [before.get(row.name, 0) for row in rows]
    texts = [text.get_text() for text in compress.texts]
    blocks = [text for text in texts if "block" in text]
    if compressor is None:
        assert texts == [
            f"7 blocks\n{plan.num_tokens:,} tokens",
            "2 x 2\nto 1",
            f"20 blocks\n{plan.num_tokens // 4:,} tokens",
        ]
        merged = plan.num_tokens // 4
    else:
        assert [text.split()[0] for text in blocks] == ["4", "14", "9"]
        merged = rows[-1].tokens
    assert f"{without.giga / 1e3:.3g} TMACs" in compress.get_xlabel()
    assert f"{figures.saved(without.total, report.total)}" in compress.get_xlabel()
    assert f"{plan.num_tokens:,} to {merged:,} tokens" in compress.get_xlabel()
    assert f"{plan.num_tokens:,} tokens of 9 views" in pack.get_xlabel()
