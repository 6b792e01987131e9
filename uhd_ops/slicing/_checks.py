# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the planner: one wording for the scalar, the batched and the native form."""

import math
from typing import Any

import numpy as np

from uhd_ops._checks import check_int

# Largest accepted values. csrc/host/slice_planner.h holds the same and says why they are safe.
LARGEST_SIDE = 2**31 - 1
LARGEST_OPTION = {
    "max_slices": 4096,
    "scale_resolution": 65536,
    "patch_size": 65536,
    "merge": 1024,
}


MISSING: Any = ...
"""The default of a required argument whose absence deserves words of its own."""


def sides(width: Any, height: Any) -> tuple[int, int]:
    """Return an image's sides as ints in [1, LARGEST_SIDE]."""
    if height is MISSING:
        raise TypeError(
            f"height is missing: width and height must be two integers, got {width!r} alone; "
            "unpack the size of an image: plan_slices(*image.size)"
        )
    width = check_int(width, "width", 1, LARGEST_SIDE)
    return width, check_int(height, "height", 1, LARGEST_SIDE)


def options(**values: Any) -> dict[str, int]:
    """Return the planner's options as ints in their ranges."""
    return {name: check_int(value, name, 1, LARGEST_OPTION[name]) for name, value in values.items()}


def overlap(value: Any, merge: int) -> int:
    """Return ``overlap`` as an int in [0, 1024] that is a multiple of ``merge``."""
    number = check_int(value, "overlap", 0, 1024)
    if number % merge:
        raise ValueError(f"overlap must be a multiple of merge = {merge} patches, got {number}")
    return number


def patch_limit(value: Any) -> int | None:
    """Return ``max_patches`` as a positive int, or None for no limit."""
    return None if value is None else check_int(value, "max_patches", 1, 2**63 - 1)


def upscale(value: Any) -> float:
    """Return ``max_upscale`` as a number of at least 1, infinite for None."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_upscale must be a number or None, got {type(value).__name__}")
    if not value >= 1:
        raise ValueError(f"max_upscale must be at least 1, got {value}")
    return float(value)


def side_array(name: str, values: Any) -> np.ndarray:
    """Return sides as an int64 array of any shape, each in [1, LARGEST_SIDE].

    Raises:
        TypeError: If the array has no integer dtype.
        ValueError: If a side is out of range; the text names the first one.
    """
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer array, got dtype {array.dtype}")
    bad = (array < 1) | (array > LARGEST_SIDE)
    if bad.any():
        position = np.unravel_index(int(bad.argmax()), array.shape)
        index = ", ".join(str(int(i)) for i in position)
        where = f"{name}[{index}]" if array.ndim else name
        raise ValueError(
            f"{where} must be an integer in [1, {LARGEST_SIDE}], got {array[position]}"
        )
    return array.astype(np.int64)
