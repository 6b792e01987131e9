# SPDX-License-Identifier: Apache-2.0
"""``slice_image`` and ``pack_views``: from pixels and a plan to the packed patches of all views."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uhd_ops._checks import check_int
from uhd_ops.slicing._checks import LARGEST_OPTION
from uhd_ops.slicing.load import load_image, readable_errors, require_pillow
from uhd_ops.slicing.plan import SlicePlan

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from uhd_ops.grids import PackedGrids
    from uhd_ops.slicing.load import ImageSource


def slice_image(image: ImageSource, plan: SlicePlan) -> list[Image.Image]:
    """Cut an image into its views: the thumbnail first, then the slices row by row.

    Thumbnail and slices are resized with Pillow's bicubic filter, as in MiniCPM-V 4.6's image
    processor (transformers' ``MiniCPMV4_6ImageProcessorPil``), and have the same pixels.

    Args:
        image: Whatever ``load_image`` takes.
        plan: A plan made for this image's size.

    Returns:
        ``plan.num_views`` images of mode "RGB".

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If a path cannot be opened.
        TypeError: If ``plan`` is not a ``SlicePlan``, or ``image`` is of no accepted type.
        ValueError: If the image cannot be read, or its size is not ``plan.image_size``.

    Example:
        >>> plan = plan_slices(800, 600)
        >>> [view.size for view in slice_image(np.zeros((600, 800, 3), dtype=np.uint8), plan)]
        [(504, 392), (504, 392), (504, 392), (504, 392), (504, 392)]
    """
    rgb = load_planned(image, plan)
    bicubic = require_pillow().Resampling.BICUBIC
    with readable_errors("a view of the plan"):  # crop refuses what open would call a bomb
        views = [rgb.resize(plan.thumbnail, bicubic)]
        if plan.resized_size is not None:
            resized = rgb.resize(plan.resized_size, bicubic)
            views += [resized.crop(box) for box in plan.boxes]
    return views


def load_planned(image: ImageSource, plan: SlicePlan) -> Image.Image:
    """Load the image that a plan was made for.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If a path cannot be opened.
        TypeError: If ``plan`` is no ``SlicePlan``, or ``image`` is of no accepted type.
        ValueError: If the image cannot be read, or its size is not ``plan.image_size``.
    """
    if not isinstance(plan, SlicePlan):
        raise TypeError(f"plan must be a SlicePlan, got {type(plan).__name__}")
    rgb = load_image(image)
    if rgb.size != plan.image_size:
        hint = ""
        if rgb.size == plan.image_size[::-1]:
            hint = (
                "; the sides are swapped, which EXIF orientation does to a file: plan from "
                "load_image(file).size"
            )
        raise ValueError(
            "image must be {}x{} px (width x height) as the plan says, got {}x{} px".format(
                *plan.image_size, *rgb.size
            )
            + hint
        )
    return rgb


def pack_views(
    views: Iterable[ImageSource],
    patch_size: int,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, PackedGrids]:
    """Normalise views and pack their patches into one sequence, view after view.

    A pixel value x in 0..255 becomes (x / 255 - mean) / std, computed in float64 and rounded once.
    Patches of a view are in raster order, and each keeps the (channel, row, column) order of a
    patch embedding's weight, so embedding them is one product::

        tokens = pixels.flatten(1) @ conv.weight.flatten(1).T + conv.bias

    The processor of MiniCPM-V 4.6 packs the same patches side by side: its layout is
    ``pixels.permute(1, 2, 0, 3).reshape(1, 3, p, N * p)``.

    Args:
        views: Images as ``slice_image`` returns them, of one or many source images; or anything
            else that ``load_image`` takes. Sides must be multiples of ``patch_size``.
        patch_size: Side of a patch in px.
        mean: Mean of all channels, or one for each of the three.
        std: Standard deviation, likewise.
        dtype: Floating-point type of the pixels; float32 if None.

    Returns:
        The patches, as a tensor on the CPU, and the ``PackedGrids`` of the views.

    Raises:
        ImportError: If Pillow is not installed.
        TypeError: If an argument is of a wrong type, or ``dtype`` is not floating point.
        ValueError: If a view's side is not a multiple of ``patch_size``, or ``mean`` and ``std``
            are not finite values with ``std`` above zero.

    Shape:
        pixels: (N, 3, patch_size, patch_size) with N = sum of h*w over the views.

    Example:
        >>> pixels, grids = pack_views([np.zeros((56, 84, 3), dtype=np.uint8)], 14)
        >>> pixels.shape, list(grids)
        (torch.Size([24, 3, 14, 14]), [(4, 6)])
    """
    import torch

    from uhd_ops.grids import PackedGrids

    patch_size = check_int(patch_size, "patch_size", 1, LARGEST_OPTION["patch_size"])
    table = torch.from_numpy(_normalised_values(mean, std)).to(_float_dtype(dtype))
    if isinstance(views, (str, bytes)) or not isinstance(views, Iterable):
        raise TypeError(f"views must be a sequence of images, got {type(views).__name__}")
    # All views are checked before the first patch is made.
    arrays = [_view_array(view, index, patch_size) for index, view in enumerate(views)]
    grids = [(a.shape[0] // patch_size, a.shape[1] // patch_size) for a in arrays]
    num_tokens = sum(height * width for height, width in grids)
    shape = (num_tokens, 3, patch_size, patch_size)
    pixels = torch.empty(shape, dtype=table.dtype, device="cpu")  # whatever the default device is
    start = 0
    for array, (height, width) in zip(arrays, grids, strict=True):
        end = start + height * width
        _look_up_patches(array, table, pixels[start:end])
        start = end
    return pixels, PackedGrids(grids)


def _look_up_patches(array: np.ndarray, table: torch.Tensor, patches: torch.Tensor) -> None:
    """Write ``table[channel, value]`` for each value of an (H, W, 3) view into (N, 3, p, p)."""
    import torch

    patch_size = patches.shape[-1]
    height, width = (side // patch_size for side in array.shape[:2])
    tiles = array.reshape(height, patch_size, width, patch_size, 3).transpose(4, 0, 2, 1, 3)
    # int32, because torch reads a uint8 index as a mask.
    index = torch.from_numpy(tiles.astype(np.int32)).flatten(1)
    for channel in range(3):
        values = table[channel].index_select(0, index[channel])
        patches[:, channel] = values.view(-1, patch_size, patch_size)


def _view_array(view: Any, index: int, patch_size: int) -> np.ndarray:
    array = np.asarray(load_image(view))
    height, width = array.shape[:2]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"views[{index}] must have sides that are multiples of patch_size = {patch_size} px, "
            f"got {width}x{height} px (width x height)"
        )
    return array


def _float_dtype(dtype: Any) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    return dtype


def _normalised_values(mean: Any, std: Any) -> np.ndarray:
    """Return the normalised value of each of the 256 pixel values, float64, one row per channel."""
    means, stds = _per_channel("mean", mean), _per_channel("std", std)
    if (stds <= 0).any():
        raise ValueError(f"std must be above zero, got {std!r}")
    return (np.arange(256) / 255 - means[:, None]) / stds[:, None]


def _per_channel(name: str, value: Any) -> np.ndarray:
    try:
        if isinstance(value, (str, bytes)):  # "123" is iterable, and float("1") a number
            raise TypeError
        values = [float(v) for v in value] if isinstance(value, Iterable) else [float(value)] * 3
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or three numbers, got {value!r}") from None
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be one or three finite numbers, got {value!r}")
    return np.array(values)
