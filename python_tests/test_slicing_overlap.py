# SPDX-License-Identifier: Apache-2.0
"""Overlapping slices, and batches of images under a budget of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd_ops import SlicePlan, pack_batches, pack_views, plan_slices, plan_slices_batch, slice_image

SIDES = st.integers(1, 4000)


@given(SIDES, SIDES, st.sampled_from([0, 2, 4, 6]), st.integers(1, 12))
def test_slices_cover_the_image_and_share_what_they_should(width, height, overlap, max_slices):
    options = {"merge": 2, "max_slices": max_slices, "max_patches": None}
    plan = plan_slices(width, height, overlap=overlap, **options)
    plain = plan_slices(width, height, **options)
    assert (plan.grid, plan.thumbnail) == (plain.grid, plain.thumbnail)
    assert plan.num_tokens == sum(h * w for h, w in plan.grids)
    assert plan.num_tokens - plan.num_overlap_tokens == plain.num_tokens
    if overlap == 0:
        assert plan == plain
    if plan.grid is None:
        assert plan.num_overlap_tokens == 0
        return
    rows, columns = plan.grid
    covered = [[0] * (plan.resized_size[axis] // 14) for axis in (0, 1)]
    boxes = np.array(plan.boxes).reshape(rows, columns, 4) // 14
    for left, right in boxes[0, :, [0, 2]].T:
        covered[0][left:right] = [count + 1 for count in covered[0][left:right]]
    for top, bottom in boxes[:, 0, [1, 3]]:
        covered[1][top:bottom] = [count + 1 for count in covered[1][top:bottom]]
    for counts, number in zip(covered, (columns, rows), strict=True):
        assert min(counts) == 1
        # Each of the number - 1 seams lies in two slices, or in more where slices are narrow.
        assert sum(count - 1 for count in counts) == (number - 1) * overlap


def test_overlap_is_printed_and_kept():
    plan = plan_slices(1920, 1080, overlap=4)
    # 8 slices of 36 x 36 instead of 32 x 32 patches: 8 * (1296 - 1024) tokens more.
    assert repr(plan).endswith(
        "2x4 slices of 504x504 px that share 4 patches (+2176 tokens), 11424 tokens)"
    )
    assert plan.boxes[:2] == ((0, 0, 504, 504), (448, 0, 952, 504))
    assert SlicePlan.from_dict(plan.to_dict()) == plan
    assert plan_slices(1920, 1080, overlap=0) == plan_slices(1920, 1080)


def test_neighbours_show_the_same_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    plan = plan_slices(1920, 1080, overlap=4)
    views = [np.asarray(view) for view in slice_image(image, plan)[1:]]
    assert np.array_equal(views[0][:, 448:], views[1][:, :56])
    assert np.array_equal(views[0][448:], views[4][:56])
    pixels, grids = pack_views(slice_image(image, plan), plan.patch_size)
    assert tuple(grids) == plan.grids
    assert len(pixels) == plan.num_tokens


def test_batched_planner_agrees():
    widths, heights = np.array([448, 1920, 3000, 100]), np.array([448, 1080, 200, 2000])
    rows = plan_slices_batch(widths, heights, overlap=4)
    for row, width, height in zip(rows, widths, heights, strict=True):
        plan = plan_slices(int(width), int(height), overlap=4)
        assert row["num_tokens"] == plan.num_tokens
        assert (row["slice_width"], row["slice_height"]) == (plan.slice or (0, 0))
    with pytest.raises(ValueError, match="image 1 of 1920x1080 px would make 11424 patches"):
        plan_slices_batch(widths, heights, overlap=4, max_patches=11000)


@pytest.mark.parametrize(
    ("overlap", "error", "message"),
    [
        (3, ValueError, "overlap must be a multiple of merge = 4 patches, got 3"),
        (-4, ValueError, r"overlap must be an integer in \[0, 1024\], got -4"),
        (4.0, TypeError, "overlap must be an int, got float"),
        (False, TypeError, "overlap must be an int, got bool"),
    ],
)
def test_bad_overlap(overlap, error, message):
    for function in (plan_slices, plan_slices_batch):
        with pytest.raises(error, match=message):
            function(1920, 1080, overlap=overlap)


def test_overlap_as_large_as_a_slice():
    fields = {**plan_slices(1920, 1080).to_dict(), "overlap": 32}
    with pytest.raises(ValueError, match="overlap must be below the sides of a slice"):
        SlicePlan.from_dict(fields)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(100, 300))
def test_batches(tokens, max_tokens):
    batches = pack_batches(tokens, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(tokens)))
    sizes = [sum(tokens[index] for index in batch) for batch in batches]
    assert all(size <= max_tokens for size in sizes)
    assert batches == sorted(sorted(batch) for batch in batches)
    # No two batches fit into one, so at most one is half empty.
    assert sum(2 * size <= max_tokens for size in sizes) <= 1
    assert batches == pack_batches(np.array(tokens, dtype=np.int64).tolist(), max_tokens)


def test_batches_of_plans():
    plans = [plan_slices(side, 1080) for side in (1920, 448, 800, 640)]
    batches = pack_batches(plans, 14000)
    assert batches == pack_batches([plan.num_tokens for plan in plans], 14000) == [[0, 1], [2, 3]]
    assert pack_batches([], 1) == []


def test_an_image_goes_into_the_batch_that_it_fills_up_best():
    assert pack_batches([7, 5, 3], 10) == [[0, 2], [1]]  # and not to 5, where more is free
    assert pack_batches([5, 7, 2, 3], 10) == [[0, 2], [1, 3]]  # and not to the first with room


@pytest.mark.parametrize(
    ("plans", "max_tokens", "error", "message"),
    [
        ([5, 9], 8, ValueError, r"max_tokens must be at least 9, the tokens of plans\[1\], got 8"),
        ([5, 0], 8, ValueError, r"plans\[1\] must be an integer in"),
        ([5, "6"], 8, TypeError, r"plans\[1\] must be an int, got str"),
        ("55", 8, TypeError, "plans must be a sequence of SlicePlans, got str"),
        ([5], 8.0, TypeError, "max_tokens must be an int, got float"),
    ],
)
def test_bad_batches(plans, max_tokens, error, message):
    with pytest.raises(error, match=message):
        pack_batches(plans, max_tokens)
