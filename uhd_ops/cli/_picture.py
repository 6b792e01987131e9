# SPDX-License-Identifier: Apache-2.0
"""Draw ``slices.png``: image, slice grid, thumbnail, and the tokens of both runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.axes import Axes
    from PIL import Image

    from uhd_ops.cli._measure import Comparison
    from uhd_ops.slicing import SlicePlan

_WIDEST = 1600  # px; the panel that shows the image has fewer
_LINE = {"color": "white", "linewidth": 1.2}


def draw(
    path: Path,
    image: Image.Image,
    thumbnail: Image.Image,
    plan: SlicePlan,
    comparison: Comparison,
    summary: dict[str, Any],
) -> None:
    """Write the picture of one encoded image.

    Args:
        path: PNG file to write.
        image: The image as loaded.
        thumbnail: Its first view.
        plan: Its views.
        comparison: For the norms of its tokens.
        summary: For the captions.
    """
    # A figure without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    width, height = plan.image_size
    # Inches; bounded, so that a strip of an image gives no strip of a picture.
    figure = Figure(figsize=(12, min(max(12 * height / width + 1, 5), 20)), layout="constrained")
    (top_left, top_right), bottom = figure.subplots(2, 2)
    _draw_image(top_left, image, plan)
    top_right.imshow(thumbnail, extent=(0, width, height, 0))
    top_right.set_title(f"thumbnail, {thumbnail.width}x{thumbnail.height} px")
    before = norm_map(comparison.norms_before, comparison.without.grids, plan.grid)
    after = norm_map(comparison.norms_after, comparison.compressed.grids, plan.grid)
    where = " in the slices" if plan.grid else ""
    layer = summary["compressor"]["layer"]
    for axes, norms, caption in zip(
        bottom,
        (before, after),
        (f"token norms after layer {layer}", "and after the compressor"),
        strict=True,
    ):
        shown = axes.imshow(norms, extent=(0, width, height, 0), interpolation="nearest")
        axes.set_title(f"{caption}: {norms.size} tokens{where}")
        _draw_grid(axes, plan)
        figure.colorbar(shown, ax=axes, location="bottom", aspect=40, pad=0.02)
    for axes in (top_left, top_right, *bottom):
        axes.set(xticks=(), yticks=())
    model = summary["model"]
    figure.suptitle(f"{Path(summary['image']).name}, {model['name']}, weights: {model['weights']}")
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)


def norm_map(
    norms: torch.Tensor, grids: Sequence[tuple[int, int]], slices: tuple[int, int] | None
) -> np.ndarray:
    """Lay the norms of the slices' tokens out like the image.

    Args:
        norms: Norms of the tokens of all views, ``(M,)``, thumbnail first.
        grids: Grids of the views.
        slices: Rows and columns of slices; None for an image that is not sliced, which shows its
            thumbnail.

    Returns:
        float32 ``(rows * h, columns * w)``.
    """
    height, width = grids[len(grids) - 1]
    rows, columns = slices or (1, 1)
    tiles = norms[-rows * columns * height * width :].reshape(rows, columns, height, width)
    return tiles.transpose(1, 2).reshape(rows * height, columns * width).numpy()


def _draw_image(axes: Axes, image: Image.Image, plan: SlicePlan) -> None:
    width, height = image.size
    small = image.copy()
    small.thumbnail((_WIDEST, _WIDEST))
    axes.imshow(small, extent=(0, width, height, 0))
    slices = "not sliced"
    if plan.grid:
        slices = f"{plan.num_slices} slices, {plan.slice[0]}x{plan.slice[1]} px each"
    axes.set_title(f"image, {width}x{height} px: {slices}")
    _draw_grid(axes, plan)


def _draw_grid(axes: Axes, plan: SlicePlan) -> None:
    width, height = plan.image_size
    rows, columns = plan.grid or (1, 1)
    for row in range(1, rows):
        axes.axhline(height * row / rows, **_LINE)
    for column in range(1, columns):
        axes.axvline(width * column / columns, **_LINE)
