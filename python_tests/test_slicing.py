# SPDX-License-Identifier: Apache-2.0
"""The slice planner: worked examples, plans as objects, batches, bad input."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from uhd_ops import _host, _native
from uhd_ops.slicing import (
    SlicePlan,
    plan_native,
    plan_slices,
    plan_slices_batch,
    planner,
    reference_planner,
)

DEFAULTS = {"max_slices": 9, "scale_resolution": 448, "patch_size": 14, "merge": 4}
# width, height, grid (rows, columns), thumbnail (w, h), slice (w, h), views, patches, merged tokens
WORKED_EXAMPLES = [
    (1, 1, None, (448, 448), None, 1, 1024, 64),
    (1, 2, None, (336, 616), None, 1, 1056, 66),
    (55, 55, None, (448, 448), None, 1, 1024, 64),
    (224, 224, None, (448, 448), None, 1, 1024, 64),
    (448, 448, None, (448, 448), None, 1, 1024, 64),
    (449, 449, (2, 1), (448, 448), (616, 336), 3, 3136, 196),
    (640, 480, (1, 2), (504, 392), (392, 560), 3, 3248, 203),
    (480, 640, (2, 1), (392, 504), (560, 392), 3, 3248, 203),
    (634, 634, (2, 2), (448, 448), (448, 448), 5, 5120, 320),
    (800, 600, (2, 2), (504, 392), (504, 392), 5, 5040, 315),
    (1024, 768, (2, 2), (504, 392), (504, 392), 5, 5040, 315),
    (672, 1008, (2, 2), (392, 560), (392, 560), 5, 5600, 350),
    (1280, 720, (2, 3), (616, 336), (504, 392), 7, 7104, 444),
    (1090, 1090, (2, 3), (448, 448), (336, 560), 7, 6784, 424),
    (1344, 1344, (3, 3), (448, 448), (448, 448), 10, 10240, 640),
    (1920, 1080, (2, 4), (616, 336), (448, 448), 9, 9248, 578),
    (1080, 1920, (4, 2), (336, 616), (448, 448), 9, 9248, 578),
    (2480, 3508, (4, 2), (392, 560), (504, 392), 9, 9184, 574),
    (3840, 2160, (2, 4), (616, 336), (448, 448), 9, 9248, 578),
    (7680, 4320, (2, 4), (616, 336), (448, 448), 9, 9248, 578),
    (16384, 16384, (3, 3), (448, 448), (448, 448), 10, 10240, 640),
    (1792, 448, (1, 4), (896, 224), (448, 448), 5, 5120, 320),
    (3136, 448, (1, 7), (1176, 168), (448, 448), 8, 8176, 511),
    (4000, 1000, (1, 8), (896, 224), (336, 616), 9, 9472, 592),
    (400, 1200, (3, 1), (280, 784), (448, 448), 4, 4192, 262),
    (1000, 1, None, (14000, 56), None, 1, 4000, 250),
    (1, 10000, None, (56, 44800), None, 1, 12800, 800),
    (15000, 15, (1, 3), (14000, 56), (8008, 56), 4, 10864, 679),
    (8000, 50, (1, 3), (5600, 56), (3248, 56), 4, 4384, 274),
    (50, 8000, (3, 1), (56, 5656), (56, 3248), 4, 4400, 275),
]


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    """Run the test on each planner."""
    chosen = {"native": _host, "reference": reference_planner}[request.param]
    monkeypatch.setattr(planner, "_backend", chosen)
    assert planner.planner_backend() == request.param


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("example", WORKED_EXAMPLES, ids=lambda e: f"{e[0]}x{e[1]}")
def test_worked_examples(example):
    width, height, grid, thumbnail, slice_size, views, patches, merged = example
    plan = plan_slices(width, height)
    assert plan.image_size == (width, height)
    assert (plan.grid, plan.thumbnail, plan.slice) == (grid, thumbnail, slice_size)
    assert (plan.num_views, plan.num_tokens, plan.num_merged_tokens) == (views, patches, merged)
    row = plan_slices_batch(width, height)
    assert (row["num_views"], row["num_tokens"]) == (views, patches)


def test_native_planner_runs():
    assert _native.status["host"] == "loaded"
    assert planner.planner_backend() == "native"


def test_reference_runs_where_the_native_module_is_missing(monkeypatch):
    monkeypatch.setitem(_native.status, "host", "absent")
    spec = importlib.util.spec_from_file_location("planner_without_native", planner.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.planner_backend() == "reference"
    assert module.plan_slices(1920, 1080) == plan_slices(1920, 1080)


def test_planning_needs_no_pillow():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from uhd_ops.slicing import plan_slices\n"
        "print(plan_slices(800, 600).num_tokens)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "5040\n"


SIDES = st.integers(1, 5000) | st.integers(1, 2**31 - 1)
OPTIONS = st.fixed_dictionaries(
    {
        "max_slices": st.integers(1, 60),
        "scale_resolution": st.integers(1, 2000),
        "patch_size": st.integers(1, 40),
        "merge": st.integers(1, 8),
    }
)


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, options=OPTIONS)
def test_every_plan_is_consistent(width, height, options):
    plan = plan_slices(width, height, **options, max_patches=None)
    unit = options["patch_size"] * options["merge"]
    assert all(side > 0 and side % unit == 0 for side in plan.thumbnail + (plan.slice or ()))
    assert plan.num_slices <= options["max_slices"]
    assert len(plan.grids) == plan.num_views == plan.num_slices + 1
    assert plan.num_tokens == sum(h * w for h, w in plan.grids)
    assert plan.grids[0] == tuple(s // options["patch_size"] for s in plan.thumbnail[::-1])
    assert len(plan.boxes) == plan.num_slices
    if plan.grid is not None:
        # Disjoint boxes of one size whose areas add up to the resized image, in raster order.
        assert plan.boxes == tuple(sorted(plan.boxes, key=lambda box: (box[1], box[0])))
        assert plan.boxes[-1][2:] == plan.resized_size
        assert len(set(plan.boxes)) == plan.num_slices
        assert {(right - left, bottom - top) for left, top, right, bottom in plan.boxes} == {
            plan.slice
        }
    assert SlicePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    row = plan_slices_batch([width], [height], **options, max_patches=None)[0]
    assert (row["grid_rows"], row["grid_columns"]) == (plan.grid or (0, 0))
    assert (row["thumbnail_width"], row["thumbnail_height"]) == plan.thumbnail
    assert (row["slice_width"], row["slice_height"]) == (plan.slice or (0, 0))
    assert (row["num_views"], row["num_tokens"]) == (plan.num_views, plan.num_tokens)


def test_boxes_and_repr():
    plan = plan_slices(640, 480)
    assert plan.boxes == ((0, 0, 392, 560), (392, 0, 784, 560))
    assert plan.resized_size == (784, 560)
    assert repr(plan) == (
        "SlicePlan(image 640x480 px, thumbnail 504x392 px, 1x2 slices of 392x560 px, 3248 tokens)"
    )
    whole = plan_slices(448, 448)
    assert (whole.boxes, whole.resized_size) == ((), None)
    assert repr(whole) == (
        "SlicePlan(image 448x448 px, thumbnail 448x448 px, no slices, 1024 tokens)"
    )
    assert len({plan, plan_slices(640, 480), whole}) == 2
    with pytest.raises(AttributeError):
        plan.patch_size = 16


@pytest.mark.usefixtures("backend")
def test_batch_broadcasts_and_keeps_shape():
    plans = plan_slices_batch(np.array([[448], [1920]], dtype=np.uint16), [448, 1080, 600])
    assert plans.shape == (2, 3)
    assert plans.dtype == reference_planner.PLAN_DTYPE
    for row, width in zip(plans, (448, 1920), strict=True):
        for plan, height in zip(row, (448, 1080, 600), strict=True):
            assert plan["num_tokens"] == plan_slices(width, height).num_tokens
    assert plan_slices_batch(448, 448).shape == ()
    assert plan_slices_batch([], []).shape == (0,)


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value", [0, -1, 2**31, -(2**70)])
def test_side_out_of_range(side, value):
    sides = {"width": 5, "height": 5, side: value}
    message = rf"^{side} must be an integer in \[1, 2147483647\], got {value}$"
    with pytest.raises(ValueError, match=message):
        plan_slices(**sides)


@pytest.mark.parametrize("function", [plan_slices, plan_native])
def test_size_in_one_argument(function):
    message = "height is missing: width and height must be two integers, got (640, 480) alone; "
    with pytest.raises(TypeError, match=re.escape(message)):
        function((640, 480))


@pytest.mark.parametrize("name", ["width", "height", *DEFAULTS])
@pytest.mark.parametrize(
    "value", [1.5, 1024.0, float("nan"), float("inf"), True, np.True_, "448", None, [448]], ids=repr
)
def test_value_that_is_no_integer(name, value):
    arguments = {"width": 5, "height": 5, name: value}
    with pytest.raises(TypeError, match=rf"^{name} must be an int, got {type(value).__name__}$"):
        plan_slices(**arguments)


@pytest.mark.parametrize(
    ("name", "largest"),
    [("max_slices", 4096), ("scale_resolution", 65536), ("patch_size", 65536), ("merge", 1024)],
)
@pytest.mark.parametrize("function", [plan_slices, plan_slices_batch])
def test_option_out_of_range(function, name, largest):
    for value in (0, -3, largest + 1):
        message = rf"^{name} must be an integer in \[1, {largest}\], got {value}$"
        with pytest.raises(ValueError, match=message):
            function(5, 5, **{name: value})
        # The native planner refuses the same in the same words, should Python ever let it through.
        with pytest.raises(ValueError, match=message):
            _host.plan_slices(np.array([5]), np.array([5]), **{**DEFAULTS, name: value})
    assert function(5, 5, **{name: largest}, max_patches=None) is not None


def test_native_planner_refuses_what_python_did_not_check():
    good = np.array([5])
    for value in (0, -7, 2**31):
        bad = np.array([value])
        with pytest.raises(ValueError, match=rf"^width must be .*2147483647\], got {value}$"):
            _host.plan_slices(bad, good, **DEFAULTS)
        with pytest.raises(ValueError, match=rf"^height must be .*2147483647\], got {value}$"):
            _host.plan_slices(good, bad, **DEFAULTS)
    for bad in (np.array([5.0]), np.array([5], dtype=np.int32), [5]):
        with pytest.raises(TypeError):
            _host.plan_slices(bad, good, **DEFAULTS)
    for bad in (np.array([[5]]), np.array([5, 5])):
        with pytest.raises(ValueError, match="one-dimensional and of one length"):
            _host.plan_slices(bad, good, **DEFAULTS)


@pytest.mark.usefixtures("backend")
def test_absurd_aspect_is_refused():
    message = (
        r"^the image of 1x300000 px would make 191552 patches, but max_patches = 65536; to allow "
        r"it, pass max_patches=191552 \(or None for no limit\), or crop or resize the image$"
    )
    with pytest.raises(ValueError, match=message):
        plan_slices(1, 300000)
    for allowed in (191552, None):
        assert plan_slices(1, 300000, max_patches=allowed).num_tokens == 191552
    with pytest.raises(ValueError, match=r"^image 2 of 1x300000 px would make 191552 patches"):
        plan_slices_batch(1, [1, 2, 300000, 300000])
    with pytest.raises(ValueError, match=r"^image \(1, 0\) of 1x300000 px"):
        plan_slices_batch(1, [[1, 2], [300000, 4]])
    with pytest.raises(ValueError, match=r"^the image of 448x448 px would make 1024 patches"):
        plan_slices(448, 448, max_patches=1023)
    assert plan_slices(448, 448, max_patches=1024).num_tokens == 1024


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"max_patches must be an integer in \[1, 9223372036854775807\], got 0"),
        (float("inf"), TypeError, "max_patches must be an int, got float"),
    ],
)
def test_bad_max_patches(value, error, message):
    for function in (plan_slices, plan_slices_batch):
        with pytest.raises(error, match=message):
            function(5, 5, max_patches=value)


@pytest.mark.parametrize(
    ("widths", "heights", "error", "message"),
    [
        (
            [5, 0],
            [5, 5],
            ValueError,
            r"^widths\[1\] must be an integer in \[1, 2147483647\], got 0$",
        ),
        ([5], [[5], [-2]], ValueError, r"^heights\[1, 0\] must be .* got -2$"),
        (0, [5], ValueError, r"^widths must be .* got 0$"),
        (
            np.array([2**63], dtype=np.uint64),
            [5],
            ValueError,
            r"^widths\[0\] must be .* got 9223372",
        ),
        ([5.0], [5], TypeError, "^widths must be an integer array, got dtype float64$"),
        ([5], [float("nan")], TypeError, "^heights must be an integer array, got dtype float64$"),
        ([True], [5], TypeError, "^widths must be an integer array, got dtype bool$"),
        (["5"], [5], TypeError, "^widths must be an integer array, got dtype <U1$"),
        ([2**70], [5], TypeError, "^widths must be an integer array, got dtype object$"),
        ([1, 2], [1, 2, 3], ValueError, r"^widths and heights must have shapes that broadcast"),
    ],
)
def test_bad_batches(widths, heights, error, message):
    with pytest.raises(error, match=message):
        plan_slices_batch(widths, heights)


# ---- fields of a plan ---------------------------------------------------------------------------

FIELDS = plan_slices(640, 480).to_dict()


def test_to_dict_holds_plain_values():
    assert FIELDS == {
        "image_size": [640, 480],
        "grid": [1, 2],
        "thumbnail": [504, 392],
        "slice": [392, 560],
        "patch_size": 14,
        "merge": 4,
        "overlap": 0,
    }
    assert plan_slices(448, 448).to_dict()["grid"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": None}, ValueError, "grid and slice must both be pairs or both be None"),
        ({"slice": None}, ValueError, "grid and slice must both be pairs or both be None"),
        ({"thumbnail": None}, TypeError, "thumbnail must be a pair of integers, got None"),
        ({"thumbnail": [504, 390]}, ValueError, r"multiples of patch_size \* merge = 56 px, got"),
        ({"slice": [391, 560]}, ValueError, r"slice must have sides .* = 56 px, got \(391, 560\)"),
        ({"grid": [1, 2, 3]}, ValueError, "grid must be a pair of integers, got 3 values"),
        ({"grid": [0, 2]}, ValueError, r"grid must be an integer in \[1, .* got 0"),
        ({"grid": [1.0, 2]}, TypeError, "grid must be an int, got float"),
        ({"grid": "12"}, TypeError, "grid must be a pair of integers, got '12'"),
        ({"image_size": [640, True]}, TypeError, "image_size must be an int, got bool"),
        ({"patch_size": 0}, ValueError, "patch_size must be an integer in"),
        ({"merge": None}, TypeError, "merge must be an int, got NoneType"),
    ],
)
def test_bad_fields(change, error, message):
    with pytest.raises(error, match=message):
        SlicePlan.from_dict({**FIELDS, **change})


def test_bad_dicts():
    with pytest.raises(ValueError, match=r"fields must have the keys \['grid', .*got \['grid'\]"):
        SlicePlan.from_dict({"grid": [1, 2]})
    with pytest.raises(ValueError, match="'unknown'"):
        SlicePlan.from_dict({**FIELDS, "unknown": 1})
    with pytest.raises(TypeError, match="fields must be a mapping, got list"):
        SlicePlan.from_dict([1, 2])
