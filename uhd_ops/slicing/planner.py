# SPDX-License-Identifier: Apache-2.0
"""``plan_slices`` and ``plan_slices_batch``: the public planner, native where it was built."""

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from uhd_ops import _native
from uhd_ops.slicing import _checks, reference_planner
from uhd_ops.slicing.plan import SlicePlan

# Both planners give the same plans; the native one is faster.
_backend: Any = reference_planner
if _native.status["host"] == "loaded":
    _backend = importlib.import_module("uhd_ops._host")

# 64 views of the default 32x32 patches. A 1x300000 px image would make 191552.
DEFAULT_MAX_PATCHES = 65536


def planner_backend() -> str:
    """Return which planner runs: "native" or "reference"."""
    return "reference" if _backend is reference_planner else "native"


def plan_slices(
    width: int,
    height: int = _checks.MISSING,
    *,
    max_slices: int = 9,
    scale_resolution: int = 448,
    patch_size: int = 14,
    merge: int = 4,
    overlap: int = 0,
    max_patches: int | None = DEFAULT_MAX_PATCHES,
) -> SlicePlan:
    """Choose an image's views from its size: a thumbnail and, if it is large, a grid of slices.

    The result equals that of MiniCPM-V 4.6's image processor (transformers'
    ``MiniCPMV4_6ImageProcessor``) for every size and option, ties between grids included.

    Args:
        width: Width of the image in px.
        height: Height of the image in px.
        max_slices: Cut into at most this many slices; 1 never slices.
        scale_resolution: A view has about ``scale_resolution²`` px. A nominal size, not a bound:
            rounding and long thin images go above it, and an image more than
            ``scale_resolution²`` times as wide as high shrinks to the smallest view.
        patch_size: Side of a patch in px.
        merge: View sides are multiples of ``merge`` patches, so that ``merge`` x ``merge`` patches
            can become one token: 4 is the processor's downsample mode "16x", 2 its "4x".
        overlap: Patches that a slice shares with each neighbour, a multiple of ``merge``. Slices
            grow by that much wherever they have neighbours, so the number of tokens grows; the
            plan prints by how much. The processor's slices, and LLaVA-UHD's, do not overlap.
        max_patches: Refuse a plan with more patches than this in all views; None for no limit.

    Returns:
        The plan.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of range, or the plan has more than ``max_patches``
            patches.

    Example:
        >>> plan_slices(800, 600)
        SlicePlan(image 800x600 px, thumbnail 504x392 px, 2x2 slices of 504x392 px, 5040 tokens)
        >>> plan_slices(448, 448).num_merged_tokens
        64
    """
    width, height = _checks.sides(width, height)
    options = _checks.options(
        max_slices=max_slices, scale_resolution=scale_resolution, patch_size=patch_size, merge=merge
    )
    overlap = _checks.overlap(overlap, options["merge"])
    limit = _checks.patch_limit(max_patches)
    sides = np.array([[width], [height]], dtype=np.int64)
    plans = _overlapping(_backend.plan_slices(sides[0], sides[1], **options), overlap, options)
    row = plans[0].item()
    rows, columns, *sizes, _, num_tokens = row
    if limit is not None and num_tokens > limit:
        raise _too_many_patches("the image", width, height, num_tokens, limit)
    return SlicePlan(
        image_size=(width, height),
        grid=(rows, columns) if rows else None,
        thumbnail=(sizes[0], sizes[1]),
        slice=(sizes[2], sizes[3]) if rows else None,
        patch_size=options["patch_size"],
        merge=options["merge"],
        overlap=overlap,
    )


def plan_slices_batch(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    *,
    max_slices: int = 9,
    scale_resolution: int = 448,
    patch_size: int = 14,
    merge: int = 4,
    overlap: int = 0,
    max_patches: int | None = DEFAULT_MAX_PATCHES,
) -> np.ndarray:
    """Plan many images at once, for example the sizes of a whole data set.

    Args:
        widths: Widths in px, an integer array of any shape.
        heights: Heights in px; broadcast against ``widths``.
        max_slices: As in ``plan_slices``, like all further options.
        scale_resolution: A view has about ``scale_resolution²`` px.
        patch_size: Side of a patch in px.
        merge: View sides are multiples of ``merge`` patches.
        overlap: Patches that a slice shares with each neighbour.
        max_patches: Refuse the batch if one plan has more patches than this. With None no size is
            refused, and the field "num_tokens" says which ones to drop.

    Returns:
        A structured array with the int64 fields "grid_rows", "grid_columns" (0 for an image that is
        not sliced), "thumbnail_width", "thumbnail_height", "slice_width", "slice_height" (px; 0 if
        not sliced), "num_views" and "num_tokens" (patches of all views).

    Raises:
        TypeError: If sides are not integer arrays, or an option is not an integer.
        ValueError: If a value is out of range, the shapes do not broadcast, or a plan has more than
            ``max_patches`` patches. The text names the first offending image.

    Shape:
        widths, heights: any shapes that broadcast. Output: the broadcast shape.

    Example:
        >>> plans = plan_slices_batch([448, 1920, 1080], [448, 1080, 1920])
        >>> plans["grid_rows"], plans["num_tokens"]
        (array([0, 2, 4]), array([1024, 9248, 9248]))
    """
    width_array = _checks.side_array("widths", widths)
    height_array = _checks.side_array("heights", heights)
    options = _checks.options(
        max_slices=max_slices, scale_resolution=scale_resolution, patch_size=patch_size, merge=merge
    )
    overlap = _checks.overlap(overlap, options["merge"])
    limit = _checks.patch_limit(max_patches)
    try:
        width_array, height_array = np.broadcast_arrays(width_array, height_array)
    except ValueError:
        raise ValueError(
            f"widths and heights must have shapes that broadcast, got {width_array.shape} and "
            f"{height_array.shape}"
        ) from None
    shape = width_array.shape
    # ravel copies what broadcasting only repeats; the native planner reads contiguous memory.
    width_array, height_array = width_array.ravel(), height_array.ravel()
    plans = _backend.plan_slices(width_array, height_array, **options)
    plans = _overlapping(plans, overlap, options)
    if limit is not None:
        _check_patches(plans["num_tokens"] > limit, plans, width_array, height_array, shape, limit)
    return plans.reshape(shape)


def _overlapping(plans: np.ndarray, overlap: int, options: dict[str, int]) -> np.ndarray:
    """Let slices grow by ``overlap`` patches along the sides where they have neighbours."""
    if overlap == 0:
        return plans
    patch = options["patch_size"]
    before = plans["slice_width"] * plans["slice_height"]
    plans["slice_width"] += overlap * patch * (plans["grid_columns"] > 1)
    plans["slice_height"] += overlap * patch * (plans["grid_rows"] > 1)
    grown = (plans["slice_width"] * plans["slice_height"] - before) // patch**2
    plans["num_tokens"] += plans["grid_rows"] * plans["grid_columns"] * grown
    return plans


def _check_patches(
    too_many: np.ndarray,
    plans: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    shape: tuple[int, ...],
    limit: int,
) -> None:
    if not too_many.any():
        return
    first = int(too_many.argmax())
    index: Any = tuple(int(i) for i in np.unravel_index(first, shape))
    index = index[0] if len(index) == 1 else index
    raise _too_many_patches(
        f"image {index}", widths[first], heights[first], plans["num_tokens"][first], limit
    )


def _too_many_patches(
    image: str, width: int, height: int, num_patches: int, limit: int
) -> ValueError:
    return ValueError(
        f"{image} of {width}x{height} px would make {num_patches} patches, "
        f"but max_patches = {limit}; to allow it, pass max_patches={num_patches} (or None for no "
        "limit), or crop or resize the image"
    )
