# SPDX-License-Identifier: Apache-2.0
"""`SlicePlan` refuses fields that are no plan, by hand and from a dict."""

import pytest

from uhd_ops.slicing import SlicePlan, plan_slices

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
