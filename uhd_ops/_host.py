# SPDX-License-Identifier: Apache-2.0
"""The native slice planner and the facts of the build, in a library that knows no Python.

``ctypes`` calls it, and lets other threads run meanwhile. A module made with Python's headers would
tie a package to one version of Python (ADR 0014). Importing this fails where the library, or a
function of it, is not there.
"""

import ctypes
from pathlib import Path

import numpy as np

_library = ctypes.CDLL(str(Path(__file__).resolve().with_name("libuhd_host.so")))
_library.uhd_plan_slices.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2]
_library.uhd_plan_slices.restype = _library.uhd_build_info.restype = ctypes.c_char_p

# To the memory of an array, which may be empty; a quarter of the time of array.ctypes.data.
_Pointer = ctypes.c_char * 0

# SlicePlan of csrc/host/slice_planner.h.
_PLAN = np.dtype(
    [
        ("grid_rows", np.int64),
        ("grid_columns", np.int64),
        ("thumbnail_width", np.int64),
        ("thumbnail_height", np.int64),
        ("slice_width", np.int64),
        ("slice_height", np.int64),
        ("num_views", np.int64),
        ("num_tokens", np.int64),
    ]
)


def plan_slices(
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    max_slices: int,
    scale_resolution: int,
    patch_size: int,
    merge: int,
) -> np.ndarray:
    """Plan many images; the rows are those of :func:`uhd_ops.slicing.plan_slices_batch`.

    Args:
        widths: Widths in px, int64, of shape ``(B,)``.
        heights: Heights in px, int64, of shape ``(B,)``.
        max_slices: Cut into at most this many slices.
        scale_resolution: A view has about ``scale_resolution``² px.
        patch_size: Side of a patch in px.
        merge: View sides are multiples of ``merge`` patches.

    Returns:
        A structured array of shape ``(B,)``.

    Raises:
        TypeError: If sides are not int64 arrays: Python has converted them.
        ValueError: If a value is out of range, or the shapes are not ``(B,)``.
    """
    for name, sides in (("widths", widths), ("heights", heights)):
        if not isinstance(sides, np.ndarray) or sides.dtype != np.int64:
            got = getattr(sides, "dtype", type(sides).__name__)
            raise TypeError(f"{name} must be an int64 array, got {got}")
    if widths.ndim != 1 or widths.shape != heights.shape:
        raise ValueError(
            "widths and heights must be one-dimensional and of one length, got "
            f"{widths.shape} and {heights.shape}"
        )
    options = np.array([max_slices, scale_resolution, patch_size, merge], np.int64)
    sides, plans = np.concatenate((widths, heights)), np.empty(widths.size, _PLAN)
    pointers = [_Pointer.from_buffer(array) for array in (sides, options, plans)]
    error = _library.uhd_plan_slices(pointers[0], widths.size, *pointers[1:])
    if error is not None:
        raise ValueError(error.decode())
    return plans


def build_info() -> dict[str, str]:
    """Return what the build was configured with, by name."""
    lines = _library.uhd_build_info().decode().split("\n")
    return dict(line.split("\t") for line in lines)
