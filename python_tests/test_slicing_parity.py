# SPDX-License-Identifier: Apache-2.0
"""Native planner = Python definition = MiniCPM-V 4.6's image processor, to the last bit."""

import numpy as np
import pytest
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)

from uhd_ops import _host
from uhd_ops.slicing import plan_slices, plan_slices_batch, reference_planner

# max_slices, scale_resolution, patch_size, merge
OPTION_NAMES = ("max_slices", "scale_resolution", "patch_size", "merge")
OPTIONS = [
    (9, 448, 14, 4),
    (9, 448, 14, 2),
    (1, 448, 14, 4),
    (2, 448, 14, 4),
    (6, 336, 14, 4),
    (7, 384, 16, 2),
    (16, 512, 16, 4),
    (36, 980, 14, 4),
    (100, 100, 3, 2),
    (12, 1, 1, 4),
]
DOWNSAMPLE_MODE = {4: "16x", 2: "4x"}
EXTREMES = [1, 2, 3, 7, 13, 55, 56, 57, 84, 140, 447, 448, 449, 896, 10007, 65500, 200704, 200705]


def sample_sizes(seed, count):
    """Sizes that meet every branch: any aspect, integer aspects (ties), multiples of a patch."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(0, np.log(30000), (count, 2))).astype(np.int64)
    quarter = count // 4
    sizes[:quarter, 0] = sizes[:quarter, 1] * rng.integers(1, 10, quarter)
    sizes[quarter : 2 * quarter, 1] = sizes[quarter : 2 * quarter, 0] * rng.integers(1, 10, quarter)
    sizes[2 * quarter : 3 * quarter] = rng.integers(1, 300, (quarter, 2)) * 14
    huge = rng.integers(1, 2**31 - 1, (count // 20, 2))
    return np.concatenate([sizes, huge])


def processor_plan(processor, width, height, max_slices, scale_resolution, patch_size, merge):
    """Ask the processor's own planning methods; the result has the first six fields of a plan."""
    mode = DOWNSAMPLE_MODE[merge]
    grid = processor.get_sliced_grid((height, width), max_slices, scale_resolution)
    thumbnail = processor.find_best_resize(
        (height, width), scale_resolution, patch_size, mode, allow_upscale=grid is None
    )
    if grid is None:
        return 0, 0, thumbnail[1], thumbnail[0], 0, 0
    rows, columns = grid
    refined = processor.get_refine_size(
        (height, width), grid, scale_resolution, patch_size, mode, allow_upscale=True
    )
    return rows, columns, thumbnail[1], thumbnail[0], refined[1] // columns, refined[0] // rows


@pytest.fixture(scope="module", params=[MiniCPMV4_6ImageProcessor, MiniCPMV4_6ImageProcessorPil])
def processor(request):
    return request.param()


@pytest.mark.parametrize("values", OPTIONS, ids=str)
def test_native_equals_reference(values):
    options = dict(zip(OPTION_NAMES, values, strict=True))
    sizes = sample_sizes(seed=values[0], count=3000)
    widths, heights = sizes[:, 0].copy(), sizes[:, 1].copy()
    native = _host.plan_slices(widths, heights, **options)
    reference = reference_planner.plan_slices(widths, heights, **options)
    assert native.dtype == reference.dtype
    np.testing.assert_array_equal(native, reference)


@pytest.mark.parametrize(
    "values",
    [(4096, 448, 14, 4), (4096, 65536, 1, 1024), (4096, 65536, 65536, 1024), (9, 65536, 7, 1)],
    ids=str,
)
def test_native_equals_reference_at_the_limits(values):
    # Python's ints cannot overflow, so equality also shows that no int64 did.
    options = dict(zip(OPTION_NAMES, values, strict=True))
    sides = np.array([1, 2, 46341, 65536, 2**20 + 1, 2**31 - 1])
    widths, heights = (axis.ravel() for axis in np.meshgrid(sides, sides))
    native = _host.plan_slices(widths, heights, **options)
    reference = reference_planner.plan_slices(widths, heights, **options)
    np.testing.assert_array_equal(native, reference)


@pytest.mark.parametrize("values", OPTIONS, ids=str)
def test_equals_processor(processor, values):
    options = dict(zip(OPTION_NAMES, values, strict=True))
    extreme = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1, 2)
    sizes = np.concatenate([extreme, sample_sizes(seed=1000 + values[0], count=300)])
    plans = plan_slices_batch(sizes[:, 0], sizes[:, 1], **options, max_patches=None)
    for (width, height), plan in zip(sizes.tolist(), plans.tolist(), strict=True):
        expected = processor_plan(processor, width, height, *values)
        assert plan[:6] == expected, f"{width}x{height} px"


def test_ties_follow_the_last_bit_of_the_logarithm():
    # |ln 1.5| is one unit in the last place below |ln (2/3)|: six slices of a square are 2x3.
    assert plan_slices(1090, 1090).grid == (2, 3)
    # 4:1 lies exactly between 2:1 and 8:1, yet rounding takes 1x8 and not 2x4.
    assert plan_slices(4000, 1000).grid == (1, 8)
    assert plan_slices(1000, 4000).grid == (8, 1)


@pytest.mark.parametrize("planner", [_host, reference_planner])
@pytest.mark.parametrize(
    ("resolution", "side"),
    [(1, 56), (28, 56), (83, 56), (84, 112), (85, 112), (140, 112), (141, 168), (196, 224)],
)
def test_halves_round_to_even_multiples(planner, resolution, side):
    # A square image that is not sliced gets a thumbnail of scale_resolution px, aligned to 56 px.
    options = dict(zip(OPTION_NAMES, (1, resolution, 14, 4), strict=True))
    plan = planner.plan_slices(np.array([500]), np.array([500]), **options)[0]
    assert (plan["thumbnail_width"], plan["thumbnail_height"]) == (side, side)
