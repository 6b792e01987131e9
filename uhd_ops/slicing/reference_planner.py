# SPDX-License-Identifier: Apache-2.0
"""The slice planner in plain Python: the definition that the native planner equals to the last bit.

The rule is that of LLaVA-UHD v4 and MiniCPM-V 4.6. Every operation on a double, its order included,
is part of the definition, because ties between grids are decided by the last bit of a logarithm.
"""

import math

import numpy as np

PLAN_DTYPE = np.dtype(
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


def round_to_multiple(length: float, unit: int) -> int:
    """Return the multiple of ``unit`` nearest to ``length``, at least one unit.

    Halves go to the even multiple: 84 -> 112, but 28 -> 56 and 140 -> 112 for unit 56.
    """
    return max(round(length / unit), 1) * unit


def fit_view(width: int, height: int, scale_resolution: int, unit: int) -> tuple[int, int]:
    """Return the sides (width, height) of a view of about ``scale_resolution²`` px.

    The aspect ratio is kept up to rounding, and both sides are multiples of ``unit`` px. Every view
    is scaled, up or down: an image that is not sliced is scaled up by the released rule, and a
    sliced one is larger than ``scale_resolution²`` px.
    """
    aspect = width / height
    # The released order: the width follows from the height after its truncation.
    fitted_height = int(scale_resolution / math.sqrt(aspect))
    fitted_width = int(fitted_height * aspect)
    return round_to_multiple(fitted_width, unit), round_to_multiple(fitted_height, unit)


def best_grid(
    width: int, height: int, max_slices: int, scale_resolution: int
) -> tuple[int, int] | None:
    """Return the slice grid (rows, columns), or None for an image that is not sliced.

    The ideal number of slices is the image's area over ``scale_resolution²``. Among all grids of
    that many slices, one fewer or one more, the one whose aspect ratio is nearest to the image's in
    the logarithm wins; of equally near ones (equal doubles) the one with more rows.
    """
    ideal = min(math.ceil(width * height / (scale_resolution * scale_resolution)), max_slices)
    if ideal <= 1:
        return None
    log_aspect = math.log(width / height)
    best, smallest = (0, 0), math.inf
    for slices in range(max(ideal - 1, 2), min(ideal + 1, max_slices) + 1):
        for rows in range(1, slices + 1):
            if slices % rows:
                continue
            columns = slices // rows
            error = abs(log_aspect - math.log(columns / rows))
            if error < smallest or (error == smallest and rows > best[0]):
                best, smallest = (rows, columns), error
    return best


def plan_one(
    width: int, height: int, *, max_slices: int, scale_resolution: int, patch_size: int, merge: int
) -> tuple[int, ...]:
    """Plan one image of the given px; returns the fields of ``PLAN_DTYPE`` in order."""
    unit = patch_size * merge
    grid = best_grid(width, height, max_slices, scale_resolution)
    thumbnail = fit_view(width, height, scale_resolution, unit)
    num_tokens = (thumbnail[0] // patch_size) * (thumbnail[1] // patch_size)
    if grid is None:
        return 0, 0, *thumbnail, 0, 0, 1, num_tokens
    rows, columns = grid
    cell_width = round_to_multiple(width, columns) // columns
    cell_height = round_to_multiple(height, rows) // rows
    slice_size = fit_view(cell_width, cell_height, scale_resolution, unit)
    num_slices = rows * columns
    num_tokens += num_slices * (slice_size[0] // patch_size) * (slice_size[1] // patch_size)
    return rows, columns, *thumbnail, *slice_size, 1 + num_slices, num_tokens


def plan_slices(
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    max_slices: int,
    scale_resolution: int,
    patch_size: int,
    merge: int,
) -> np.ndarray:
    """Plan many images: the same arguments and result as the native planner.

    Args:
        widths: Widths in px, int64, each in [1, 2³¹ - 1].
        heights: Heights in px, likewise.
        max_slices: An image is cut into at most this many slices.
        scale_resolution: A view has about ``scale_resolution²`` px.
        patch_size: Side of a patch in px.
        merge: View sides are multiples of ``merge`` patches.

    Returns:
        One row of ``PLAN_DTYPE`` per image.

    Shape:
        widths, heights: (S,). Output: (S,).
    """
    options = {
        "max_slices": max_slices,
        "scale_resolution": scale_resolution,
        "patch_size": patch_size,
        "merge": merge,
    }
    # Python ints: NumPy's round and divide differently from the definition.
    sizes = zip(widths.tolist(), heights.tolist(), strict=True)
    return np.array([plan_one(w, h, **options) for w, h in sizes], dtype=PLAN_DTYPE)
