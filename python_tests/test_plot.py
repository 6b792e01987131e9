# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.plot``: what is drawn is what was given, where it belongs, and can be read."""

import itertools
import math
import operator
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import uhd_ops
from uhd_ops import flops, plot

PLAN = uhd_ops.plan_slices(900, 600, scale_resolution=160, patch_size=16, max_slices=6)
OVERLAPPING = uhd_ops.plan_slices(
    900, 600, scale_resolution=160, patch_size=16, max_slices=6, overlap=4
)
WHOLE = uhd_ops.plan_native(300, 200, patch_size=20)
SIGLIP = flops.SIGLIP_SO400M


def image_of(plan, seed=0):
    width, height = plan.image_size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def axes():
    return Figure().subplots()


def corners(rectangle):
    (left, top), (right, bottom) = rectangle.get_bbox().get_points()
    return left, top, right, bottom


# ---- on the image --------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, OVERLAPPING], ids=["plain", "overlap"])
def test_slices_are_where_the_plan_cuts(plan, axes):
    assert plot.views(image_of(plan), plan, axes=axes) is axes
    assert (plan.num_slices, len(axes.patches)) == (6, 6)
    scale = np.divide(plan.image_size * 2, plan.resized_size * 2)
    for rectangle, box in zip(axes.patches, plan.boxes, strict=True):
        assert corners(rectangle) == pytest.approx(box * scale)
    assert corners(axes.patches[-1])[2:] == pytest.approx((900, 600))
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 900), (600, 0))
    assert axes.get_title().startswith(
        f"900x600 px: 6 slices of {plan.slice[0]}x{plan.slice[1]} px"
    )
    (shown,) = axes.images
    assert shown.get_extent() == [0, 900, 600, 0]
    assert np.array_equal(shown.get_array(), np.asarray(image_of(plan)))


@pytest.mark.parametrize("window", [2, 3, 7])
@pytest.mark.parametrize("plan", [PLAN, WHOLE], ids=["slices", "one view"])
def test_windows_are_where_they_merge(plan, window, axes):
    plot.views(image_of(plan), plan, window=window, axes=axes)
    (lines,) = axes.collections
    rows, columns = plan.grids[-1]
    each = math.ceil(rows / window) - 1 + math.ceil(columns / window) - 1
    segments = lines.get_segments()
    assert len(segments) == each * max(plan.num_slices, 1)
    # The borders of the first view, in patches.
    across, down = np.divide(plan.image_size, (plan.grid or (1, 1))[::-1])
    first = np.array(segments[:each])
    assert np.allclose(
        sorted({y for (_, y), (_, end) in first if y == end}),
        [down * row / rows for row in range(window, rows, window)],
    )
    assert np.allclose(
        sorted({x for (x, _), (end, _) in first if x == end}),
        [across * column / columns for column in range(window, columns, window)],
    )


def test_large_images_are_shown_smaller(axes):
    plan = uhd_ops.plan_slices(3000, 500)
    plot.views(Image.new("RGB", (3000, 500)), plan, axes=axes)
    assert axes.images[0].get_array().shape == (500, 1600, 3)
    assert axes.get_xlim() == (0, 3000)


def test_ratios(axes):
    ratios = [1, 4, 16, 4, 4, 16, 1]
    plot.ratios(image_of(PLAN), PLAN, ratios, axes=axes)
    left = uhd_ops.nn.ViewRatios(ratios, PLAN.grids).grids
    expected = [f"{r} to 1\n{h * w} tokens" for r, (h, w) in zip(ratios, left, strict=True)]
    assert [text.get_text() for text in axes.texts] == expected[1:]
    assert len(axes.patches) == 6
    colors = [patch.get_facecolor() for patch in axes.patches]
    for (a, one), (b, other) in itertools.combinations(zip(ratios[1:], colors, strict=True), 2):
        assert (a == b) == (one == other)
    for text, rectangle in zip(axes.texts, axes.patches, strict=True):
        (left_, top, right, bottom), (x, y) = corners(rectangle), text.get_position()
        assert (x, y) == pytest.approx(((left_ + right) / 2, (top + bottom) / 2))
    assert axes.get_title() == (
        f"{PLAN.num_tokens} patches become {left.num_tokens} tokens\n"
        f"thumbnail: 1 to 1, {left[0][0] * left[0][1]} tokens"
    )


def test_ratios_of_an_image_that_is_not_sliced(axes):
    plot.ratios(image_of(WHOLE), WHOLE, [16], axes=axes)
    assert [text.get_text() for text in axes.texts] == [f"16 to 1\n{WHOLE.num_tokens // 16} tokens"]
    assert corners(axes.patches[0]) == (0, 0, 300, 200)


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, OVERLAPPING], ids=["plain", "overlap"])
def test_every_slice_has_its_tokens(plan, axes):
    x = torch.randn(plan.num_tokens, 5, generator=torch.manual_seed(0))
    plot.tokens(x, plan.grids, plan, axes=axes)
    norms = x.double().norm(dim=1).split([h * w for h, w in plan.grids])[1:]
    every = torch.cat(norms)
    scale = np.divide(plan.image_size * 2, plan.resized_size * 2)
    for shown, values, box in zip(axes.images, norms, plan.boxes, strict=True):
        left, top, right, bottom = box * scale
        assert shown.get_extent() == pytest.approx([left, right, bottom, top])
        assert np.array_equal(shown.get_array(), values.view(plan.grids[1]))
        assert shown.get_clim() == (every.min(), every.max())  # one scale for all
    assert axes.get_title() == f"{len(every)} tokens in the slices"
    assert len(axes.patches) == plan.num_slices
    (_, bar) = axes.figure.axes
    assert bar.get_xlabel() == "L2 norm of a token"


def test_numbers_are_drawn_as_they_are(axes):
    values = torch.arange(20.0) - 7
    plot.tokens(values, (4, 5), label="margin", axes=axes)
    assert np.array_equal(axes.images[0].get_array(), values.view(4, 5))
    assert (axes.get_title(), axes.figure.axes[1].get_xlabel()) == ("20 tokens", "margin")
    assert not axes.patches


def test_principal_components():
    """Three directions that differ in variance are the three colours; one scale for both maps."""
    grids = [(8, 6)]
    cells = torch.randn(12, 3, generator=torch.manual_seed(1)) * torch.tensor([4.0, 2.0, 1.0])
    x = cells.view(4, 3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(48, 3)
    figure = plot.merge(
        x @ torch.linalg.qr(torch.randn(7, 7))[0][:3],  # in a space of seven channels
        uhd_ops.window_mean(x, grids) @ torch.zeros(3, 7),
        grids,
        show="pca",
        figure=Figure(),
    )
    before, after = (axes.images[0].get_array() for axes in figure.axes)
    assert (before.shape, after.shape) == ((8, 6, 3), (4, 3, 3))
    assert len(figure.axes) == 2  # colours have no bar
    assert 0 <= before.min() < 0.1 < 0.9 < before.max() <= 1
    assert np.ptp(after.reshape(-1, 3), axis=0).max() < 1e-9


def test_equal_tokens_have_equal_colors():
    """Also where those behind the merge differ otherwise: they share components and their range."""
    grids = [(8, 6)]
    x = torch.randn(48, 9, generator=torch.manual_seed(2))
    loud = x.norm(dim=1).topk(12).indices
    figure = plot.merge(x, x[loud], grids, show="pca", figure=Figure())
    before, after = (axes.images[0].get_array() for axes in figure.axes)
    assert np.allclose(before.reshape(48, 3)[loud], after.reshape(12, 3), atol=1e-9)
    # The first component is that of all tokens drawn.
    every = torch.cat([x, x[loud]]).double()
    _, _, right = torch.linalg.svd(every - every.mean(0), full_matrices=False)
    red = (x.double() - every.mean(0)) @ right[0]
    assert abs(np.corrcoef(red, before[..., 0].flatten())[0, 1]) > 0.99


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_few_channels(channels, axes):
    plot.tokens(torch.randn(12, channels), (3, 4), show="pca", axes=axes)
    assert np.isfinite(axes.images[0].get_array()).all()


def test_merge_beside_the_image():
    x = torch.rand(PLAN.num_tokens)
    merged = uhd_ops.window_mean(x[:, None], PLAN.grids)[:, 0]
    figure = plot.merge(x, merged, PLAN.grids, PLAN, image=image_of(PLAN), figure=Figure())
    image, before, after, *bars = figure.axes
    slices = PLAN.num_tokens - PLAN.grids[0][0] * PLAN.grids[0][1]
    assert image.get_title().startswith("900x600 px: 6 slices")
    assert before.get_title() == f"before the merge:\n{slices} tokens in the slices"
    assert after.get_title() == f"after the merge:\n{slices // 4} tokens in the slices"
    assert [bar.get_xlabel() for bar in bars] == ["value", "value"]
    photos = [a for a in figure.axes for shown in a.images if shown.get_array().shape[-1] == 3]
    assert photos == [image]  # the photograph is there once
    slot = np.stack([shown.get_array() for shown in before.images])
    rows, columns = PLAN.grids[1]
    means = slot.reshape(6, rows // 2, 2, columns // 2, 2).mean((2, 4))
    assert np.allclose(means, np.stack([shown.get_array() for shown in after.images]), atol=1e-6)


# ---- attention -----------------------------------------------------------------------------------


def by_hand(q, k, grids, window, scale):
    """The weights of each window: ``(view, row, column)`` to ``(H, n, n)``, and what tokens get."""
    weights, received, start = {}, torch.zeros(len(q)), 0
    for view, (height, width) in enumerate(grids):
        token = start + torch.arange(height * width).view(height, width)
        for row in range(math.ceil(height / window)):
            for column in range(math.ceil(width / window)):
                cut = slice(row * window, (row + 1) * window), slice(column * window, None)
                inside = token[cut][:, :window].flatten()
                heads = q.shape[1] // k.shape[1]
                keys = k[inside].repeat_interleave(heads, 1)
                scores = torch.einsum("ihd,jhd->hij", q[inside], keys) * scale
                weights[view, row, column] = scores.softmax(-1)
                received[inside] = weights[view, row, column].mean(0).sum(0)
        start += height * width
    return weights, received


@pytest.mark.parametrize(
    ("window", "heads", "at"), [(2, 3, (1, 1, 2)), (3, 2, (0, 1, 1)), (2, 1, None)]
)
def test_attention_is_that_of_the_operator(window, heads, at):
    torch.manual_seed(0)
    plan = uhd_ops.SlicePlan((100, 60), (1, 1), (30, 25), (35, 25), 5, 1)
    grids = [(5, 6), (5, 7)]  # ragged at both edges
    q, k = 2 * torch.randn(65, 2 * heads, 4), torch.randn(65, heads, 4)
    shown, given = (None, grids[:1]) if at is None or at[0] == 0 else (plan, grids)
    q, k = q[: 65 if shown else 30], k[: 65 if shown else 30]
    figure = plot.attention(q, k, given, shown, window=window, at=at, scale=0.7, figure=Figure())
    weights, received = by_hand(q, k, given, window, 0.7)
    over, matrices, *bars = figure.axes
    drawn = np.asarray(over.images[0].get_array())
    assert np.allclose(drawn, received.view(-1)[-drawn.size :].view(drawn.shape), atol=1e-5)
    view = 1 if shown else 0
    if at is None:  # the least even whole window
        entropy = {
            key: -torch.xlogy(w, w).sum().item() for key, w in weights.items() if w.shape[1] == 4
        }
        at = min(entropy, key=entropy.get)
    assert at[0] == view
    assert f"window ({at[1]}, {at[2]}) of view {view}, {2 * heads} heads" in matrices.get_title()
    expected = weights[at]
    side, tiles = expected.shape[1] + 1, np.asarray(matrices.images[0].get_array())
    across = math.ceil(math.sqrt(2 * heads))
    for head, matrix in enumerate(expected):
        row, column = divmod(head, across)
        tile = tiles[row * side :, column * side :][: side - 1, : side - 1]
        assert np.allclose(tile, matrix, atol=1e-5)
    labels = {bar.get_xlabel() or bar.get_ylabel() for bar in bars}
    assert labels == {"attention that a token gets; 1: its even share", "weight of a key"}
    FigureCanvasAgg(figure).draw()
    assert over.get_window_extent().y1 == pytest.approx(matrices.get_window_extent().y1, abs=1)
    frame = over.patches[-1]
    width, height = (100, 60) if shown else (6, 5)
    rows, columns = given[view]
    left, top = at[2] * window * width / columns, at[1] * window * height / rows
    assert corners(frame)[:2] == pytest.approx((left, top))
    assert corners(frame)[2] == pytest.approx(min(left + window * width / columns, width))


# ---- what can be read ----------------------------------------------------------------------------


TOP, LEFT = operator.attrgetter("y1"), operator.attrgetter("x0")


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (64, 48), (48, 64), (1, 1)], ids=str)
def test_panels_of_any_image_can_be_seen(size):
    """No panel is a hairline, no picture has more pixels than a screen, no title covers another."""
    plan = uhd_ops.plan_slices(*size, scale_resolution=160, patch_size=16)
    x = torch.rand(plan.num_tokens)
    after = uhd_ops.window_mean(x[:, None], plan.grids)[:, 0]
    image = Image.new("RGB", size, "teal")
    figure = plot.merge(x, after, plan.grids, plan, image=image, label="norm", figure=Figure())
    figure.suptitle("the heading of uhd-ops encode")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    inches = [
        a.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for a in figure.axes
    ]
    assert all(min(box.width, box.height) > 1 for box in inches[:3])
    assert max(figure.get_size_inches()) < 25
    renderer = canvas.get_renderer()
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes[:3]]
    for one, other in itertools.combinations(titles, 2):
        assert not one.overlaps(other)
    for title, axes in itertools.product(titles, figure.axes):
        assert not title.overlaps(axes.get_window_extent())
    tops, lefts = ({round(at(box), 2) for box in inches[:3]} for at in (TOP, LEFT))
    assert 1 in (len(tops), len(lefts))  # in a row or in a column
    page = figure.bbox
    assert all(page.x0 <= title.x0 and title.x1 <= page.x1 for title in titles)
    stretched = size[0] / size[1] > 6 or size[1] / size[0] > 6
    assert ("stretched" in figure.axes[0].get_title()) == stretched


# ---- where it is drawn ---------------------------------------------------------------------------


def test_a_figure_of_pyplot_by_default():
    before = pyplot.get_fignums()
    axes = plot.bars(["a"], {"x": [1]})
    figure = plot.timings({"case": {"uhd_ops": 1.0}})
    assert [*before, axes.figure.number, figure.number] == pyplot.get_fignums()
    plot.timings({"case": {"uhd_ops": 1.0}}, figure=Figure())
    assert pyplot.get_fignums() == [*before, axes.figure.number, figure.number]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"^pictures need matplotlib: pip install 'uhd_ops\[plot\]'"
    ):
        plot.bars(["a"], {"x": [1]})


X, GRIDS = torch.randn(24, 4), [(4, 6)]
QK = torch.randn(24, 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: plot.views(Image.new("RGB", (9, 9)), PLAN),
            ValueError,
            "image must be 900x600 px",
        ),
        (
            lambda: plot.views(image_of(PLAN), None),
            TypeError,
            "plan must be a SlicePlan, got NoneType",
        ),
        (
            lambda: plot.views(image_of(PLAN), PLAN, window=0),
            ValueError,
            "window must be at least 1, got 0",
        ),
        (
            lambda: plot.views(image_of(PLAN), PLAN, axes=Figure()),
            TypeError,
            "axes must be matplotlib Axes, got Figure",
        ),
        (lambda: plot.ratios(image_of(PLAN), PLAN, [1, 4]), ValueError, "ratios must"),
        (
            lambda: plot.tokens(X[1:], GRIDS),
            ValueError,
            r"x must be \(N, C\) or \(N,\) with N = 24",
        ),
        (lambda: plot.tokens(X.int(), GRIDS), TypeError, "x must be float32"),
        (
            lambda: plot.tokens(X, [(2, 6), (2, 6)]),
            ValueError,
            "grids must hold one view with tokens without a plan, got",
        ),
        (
            lambda: plot.tokens(X, GRIDS, PLAN),
            ValueError,
            "grids must hold the 7 views of the plan",
        ),
        (lambda: plot.tokens(X, GRIDS, 3), TypeError, "plan must be a SlicePlan, got int"),
        (
            lambda: plot.tokens(X, GRIDS, show="mean"),
            ValueError,
            'show must be "norm" or "pca", got',
        ),
        (
            lambda: plot.merge(X, X[:6], GRIDS, image=image_of(PLAN)),
            ValueError,
            "plan must be given with image, got None",
        ),
        (
            lambda: plot.merge(X, X, GRIDS),
            ValueError,
            r"after must be \(N, C\) or \(N,\) with N = 6",
        ),
        (
            lambda: plot.merge(X, X[:6, :2], GRIDS),
            ValueError,
            r"after must have the shape \(M, \*\(4,\)\), like before, got \(6, 2\)",
        ),
        (
            lambda: plot.merge(X, X[:6], GRIDS, figure=3),
            TypeError,
            "figure must be a matplotlib Figure, got int",
        ),
        (
            lambda: plot.attention(X, X, GRIDS),
            ValueError,
            r"q and k must be \(N, H, D\), got shapes",
        ),
        (lambda: plot.attention(QK[1:], QK[1:], GRIDS), ValueError, "q must be"),
        (
            lambda: plot.attention(QK, QK, GRIDS, at=(0, 2, 0)),
            ValueError,
            r"at must be a window of a view on the map, \[0\], whose windows are \[\(2, 3\)\], got",
        ),
        (lambda: plot.layers(3), TypeError, "report must be a FlopReport, got int"),
        (
            lambda: plot.layers(
                flops.count_vit(SIGLIP, GRIDS), flops.count_vit(SIGLIP, GRIDS, counting="paper")
            ),
            ValueError,
            "without must be counted like report, 'macs', got 'paper'",
        ),
        (lambda: plot.costs({}), ValueError, "lines must hold a line, got none"),
        (lambda: plot.costs({"a": []}), ValueError, r"lines\['a'\] must have points, got none"),
        (
            lambda: plot.costs({"a": [(1, 0)]}),
            ValueError,
            r"lines\['a'\] must hold positive numbers, got 0",
        ),
        (lambda: plot.bars(["a"], {}), ValueError, "series must hold one, got none"),
        (
            lambda: plot.bars(["a"], {"x": [1, 2]}),
            ValueError,
            r"series\['x'\] must have 1 numbers, one for each name, got 2",
        ),
        (lambda: plot.timings({}), ValueError, "cases must hold one, got none"),
        (
            lambda: plot.agreement([("a", 1, 1)], rounding=0, unit=""),
            ValueError,
            "rounding must be positive, got 0",
        ),
        (
            lambda: plot.agreement([], rounding=1, unit=""),
            ValueError,
            "rows must hold one, got none",
        ),
        (
            lambda: plot.diagram(image_of(PLAN), PLAN),
            ValueError,
            "plan must have patches of 14 px, like the encoder, got 16 px",
        ),
        (
            lambda: plot.diagram(image_of(PLAN), PLAN, 3),
            TypeError,
            "vit must be a ViTConfig, got int",
        ),
    ],
)
def test_refuses(call, error, message):
    """With the argument, what was expected and what came; and no empty figure is left open."""
    before = pyplot.get_fignums()
    with pytest.raises(error, match=f"^{message}"):
        call()
    assert pyplot.get_fignums() == before
