# SPDX-License-Identifier: Apache-2.0
"""plan_native: one view at native resolution, at most a budget; and what other processors do."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from families.case import assert_close
from hypothesis import assume, example, given, settings
from timm.models.vision_transformer import VisionTransformer
from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from uhd_ops import insert_early_compressor, nn, refine_patch_embedding
from uhd_ops.slicing import SlicePlan, pack_batches, pack_views, plan_native, slice_image

SIDES = st.integers(1, 5000) | st.integers(1, 2**31 - 1)
OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(64, 3000) | st.integers(64, 2**40),
        "patch_size": st.integers(1, 40),
        "merge": st.integers(1, 8),
        "max_upscale": st.just(1.0) | st.floats(1, 1e6) | st.none(),
    }
)


def units(plan):
    """Columns and rows of merge x merge patches."""
    unit = plan.patch_size * plan.merge
    assert all(side % unit == 0 for side in plan.thumbnail)
    return [side // unit for side in plan.thumbnail]


@pytest.mark.parametrize(
    ("size", "options", "view", "tokens"),
    [
        ((1920, 1080), {}, (1904, 1064), 10336),
        ((1792, 1792), {}, (1792, 1792), 16384),
        ((1793, 1792), {}, (1792, 1792), 16384),
        ((3840, 2160), {"max_tokens": 4096}, (1176, 672), 4032),
        ((300, 200), {"max_tokens": 9216}, (280, 224), 320),  # small images stay small
        ((300, 200), {"max_tokens": 9216, "max_upscale": 1.5}, (448, 280), 640),
        ((300, 200), {"max_tokens": 9216, "max_upscale": None}, (1624, 1064), 8816),
        ((140, 84), {}, (112, 112), 64),  # 2.5 and 1.5 units: halves go to the even one
        ((1, 1), {}, (56, 56), 16),
        ((1, 10000), {}, (56, 10024), 2864),
        ((10**6, 10), {}, (57344, 56), 16384),
        ((2**31 - 1, 2**31 - 1), {"max_upscale": None}, (1792, 1792), 16384),
        ((500, 300), {"max_tokens": 16}, (56, 56), 16),
        # LLaVA-UHD v3: patches of 10 px, merged twice, at most 1560² px.
        ((4000, 3000), {"max_tokens": 1560**2 // 100, "patch_size": 10}, (1800, 1320), 23760),
    ],
)
def test_worked_examples(size, options, view, tokens):
    plan = plan_native(*size, **options)
    assert (plan.image_size, plan.thumbnail, plan.num_tokens) == (size, view, tokens)
    assert (plan.grid, plan.slice, plan.num_views, plan.boxes) == (None, None, 1, ())
    assert SlicePlan.from_dict(plan.to_dict()) == plan


@settings(deadline=None, max_examples=500)
@given(width=SIDES, height=SIDES, options=OPTIONS)
@example(width=10**6, height=10, options={"max_tokens": 64})
@example(width=400, height=500, options={"max_tokens": 300, "patch_size": 40, "merge": 1})
def test_every_plan(width, height, options):
    plan = plan_native(width, height, **options)
    columns, rows = units(plan)
    unit = plan.patch_size * plan.merge
    assert 0 < plan.num_tokens <= options["max_tokens"]
    # Not larger than asked for, up to rounding to one unit.
    scale = options.get("max_upscale", 1.0)
    for count, side in ((columns, width), (rows, height)):
        if scale is not None:
            assert count <= max(Fraction(side) * Fraction(scale) / unit + Fraction(1, 2), 1)
    # An exact scaling s of the image is less than one unit away on both sides: some s lies in both
    # intervals ((columns ± 1) / width) and ((rows ± 1) / height).
    assert (columns - 1) * height < (rows + 1) * width
    assert (rows - 1) * width < (columns + 1) * height
    # Nor is it smaller than need be: one more unit on each side would be too much for the budget or
    # for the largest scale.
    fits = (columns + 1) * (rows + 1) * plan.merge**2 <= options["max_tokens"]
    if fits and scale is not None:
        assert columns + 1 > width * scale / unit - 0.5 or rows + 1 > height * scale / unit - 0.5
    assert not (fits and scale is None)


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, options=OPTIONS, more=st.integers(0, 5000))
def test_larger_budgets_make_no_side_shorter(width, height, options, more):
    small = plan_native(width, height, **options).thumbnail
    options["max_tokens"] += more
    large = plan_native(width, height, **options).thumbnail
    assert small[0] <= large[0]
    assert small[1] <= large[1]


@settings(deadline=None)
@given(columns=st.integers(1, 60), rows=st.integers(1, 60), options=OPTIONS)
def test_images_that_fit_are_not_resampled(columns, rows, options):
    unit = options["patch_size"] * options["merge"]
    options |= {"max_upscale": 1.0, "max_tokens": columns * rows * options["merge"] ** 2}
    assert units(plan_native(columns * unit, rows * unit, **options)) == [columns, rows]
    # One unit larger is a token too many.
    if columns > 1:
        options["max_tokens"] -= 1
        assert units(plan_native(columns * unit, rows * unit, **options)) != [columns, rows]


@settings(deadline=None)
@given(width=SIDES, height=SIDES, options=OPTIONS)
def test_turned_images_have_turned_views(width, height, options):
    plan, turned = plan_native(width, height, **options), plan_native(height, width, **options)
    assert plan.thumbnail == turned.thumbnail[::-1]


# ---- other processors ---------------------------------------------------------------------------

NORMAL = st.integers(15, 8000)  # Qwen rounds a side of less than half a unit of 28 px to nothing


@settings(deadline=None, max_examples=1000)
@given(width=NORMAL, height=NORMAL, max_tokens=st.integers(4, 20000))
@example(width=8000, height=8000, max_tokens=16384)
@example(width=36, height=847, max_tokens=100)
@example(width=400, height=50, max_tokens=56)  # Qwen's rule enlarges: 14.3 x 1.8 units to 14 x 1
def test_qwen(width, height, max_tokens):
    """Equal to Qwen's, but where its rule for large images enlarges one: there no side grows."""
    assume(max(width, height) <= 200 * min(width, height))  # Qwen refuses others
    theirs = smart_resize(height, width, 28, min_pixels=1, max_pixels=max_tokens * 14**2)[::-1]
    ours = plan_native(width, height, max_tokens=max_tokens, merge=2).thumbnail
    for side, other, own, theirs_side in (
        (width, height, ours[0], theirs[0]),
        (height, width, ours[1], theirs[1]),
    ):
        expected = min(theirs_side, max(round(side / 28), 1) * 28)
        # Where the shorter side is a single unit, Qwen's rule can go above its budget.
        if theirs[0] * theirs[1] > max_tokens * 14**2:
            expected = min(expected, max_tokens // 4 * 28)
        # Where the exact side is a whole number of units, Qwen's floating point may be below it.
        units_squared = Fraction(side * max_tokens, other * 4)
        whole = Fraction(math.isqrt(int(units_squared))) ** 2 == units_squared
        assert own == expected or (whole and own == expected + 28)


@settings(deadline=None)
@given(long=st.integers(3000, 8000), short=st.integers(900, 3000), upright=st.booleans())
def test_llava_uhd_v3(long, short, upright):
    """Rows are v3's for an image above its budget; columns, too, or one more.

    It makes the width of the truncated height, and truncates that again.
    """
    resolution, unit = 1560, 40
    width, height = (short, long) if upright else (long, short)
    fitted_height = int(resolution / math.sqrt(width / height))
    fitted_width = int(fitted_height * (width / height))
    plan = plan_native(width, height, max_tokens=resolution**2 // 100, patch_size=10)
    columns, rows = units(plan)
    assert rows == fitted_height // unit
    assert columns - fitted_width // unit in (0, 1)


@settings(deadline=None)
@given(width=st.integers(1, 1700), height=st.integers(1, 1700))
def test_kimi(width, height):
    """Where an image fits, Kimi K2.5 pads it to as many units, or one more."""
    _, padded = navit_resize(height, width, 14, 2, 16384, 512)
    plan = plan_native(width, height, merge=2)
    for theirs, ours in zip(padded[::-1], plan.thumbnail, strict=True):
        assert theirs - ours in (0, 28)


@settings(deadline=None, max_examples=30)
@given(side=st.integers(20, 2000), max_tokens=st.integers(1, 1024))
def test_naflex(side, max_tokens):
    """Squares that fill the budget are SigLIP 2's; for others it rounds up, and we down."""
    theirs = get_image_size_for_max_num_patches(side, side, 16, max_tokens)
    plan = plan_native(side, side, max_tokens=max_tokens, patch_size=16, merge=1, max_upscale=None)
    assert plan.thumbnail == theirs


# ---- encoding -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 5])
def test_slice_encoder_takes_native_plans(patch):
    """Native views of several images in one pass are each what the model makes of it alone."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=40, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0,
        dynamic_img_size=True, class_token=False, global_pool="avg",
    ).eval()  # fmt: skip
    refine_patch_embedding(vit, patch)
    encoder = nn.SliceEncoder(insert_early_compressor(vit, 1))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((90, 60), (40, 200))]
    options = {"max_tokens": 64, "patch_size": patch, "merge": 2}
    plans = [plan_native(i.shape[1], i.shape[0], **options) for i in images]
    assert [len(batch) for batch in pack_batches(plans, 64)] == [1, 1]
    views = [slice_image(image, plan) for image, plan in zip(images, plans, strict=True)]
    assert [len(v) for v in views] == [1, 1]
    pixels, grids = pack_views([view for v in views for view in v], patch)
    assert grids.num_tokens == sum(plan.num_tokens for plan in plans)
    result = encoder(pixels, grids, views_per_image=[1, 1])
    for (view,), tokens in zip(views, result.per_image(), strict=True):
        x = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None] / 255.0 * 2 - 1
        assert_close(tokens, vit.forward_features(x)[0], 1000)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 0}, ValueError, r"width must be an integer in \[1, 2147483647\], got 0"),
        ({"height": 2**31}, ValueError, r"height must be an integer in \[1, 2147483647\]"),
        ({"height": 10.0}, TypeError, "height must be an int, got float"),
        ({"max_tokens": 0}, ValueError, r"max_tokens must be an integer in \[1, "),
        ({"max_tokens": 15}, ValueError, "max_tokens must be at least merge² = 16, the patches"),
        ({"max_tokens": 1e4}, TypeError, "max_tokens must be an int, got float"),
        ({"patch_size": 0}, ValueError, r"patch_size must be an integer in \[1, 65536\], got 0"),
        ({"merge": 1025}, ValueError, r"merge must be an integer in \[1, 1024\], got 1025"),
        ({"max_upscale": 0.5}, ValueError, "max_upscale must be at least 1, got 0.5"),
        ({"max_upscale": math.nan}, ValueError, "max_upscale must be at least 1, got nan"),
        ({"max_upscale": True}, TypeError, "max_upscale must be a number or None, got bool"),
        ({"max_upscale": "2"}, TypeError, "max_upscale must be a number or None, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        plan_native(**{"width": 100, "height": 100, **arguments})
