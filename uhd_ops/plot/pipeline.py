# SPDX-License-Identifier: Apache-2.0
"""The way of an image through the encoder in one picture: slice, pack, compress."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from uhd_ops.flops.count import SIGLIP_SO400M, FlopReport, ViTConfig, count_vit
from uhd_ops.grids import PackedGrids
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.plot.figures import (
    BLUE,
    GREY,
    ORANGE,
    figure_of,
    in_units,
    readable,
    saved,
    strip_spines,
)
from uhd_ops.slicing.views import slice_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from uhd_ops.slicing.load import ImageSource
    from uhd_ops.slicing.plan import SlicePlan

_TILE = 220  # px; the views are shown small
_GAP = 0.035  # between views, of the longer side of the image


def diagram(
    image: ImageSource,
    plan: SlicePlan,
    vit: ViTConfig = SIGLIP_SO400M,
    compressor: CompressorConfig | None = None,
    *,
    figure: Figure | None = None,
) -> Figure:
    """Draw what happens to an image: sliced, packed into one sequence, compressed in the encoder.

    With the numbers of tokens, and with the multiply-accumulates of every block with and without
    the compressor.

    Args:
        image: Whatever :func:`uhd_ops.load_image` takes.
        plan: A plan made for this image's size.
        vit: Sizes of the encoder, such as those of :func:`uhd_ops.flops.vit_config`.
        compressor: What is inserted into it; None for the early compressor after layer 6.
        figure: Where to draw; it gets the size that this takes. None for a new one of pyplot.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib or Pillow is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If the image cannot be read, its size is not ``plan.image_size``, the patches of
            the plan have another size than those of the encoder, or it has no such layer.

    Example:
        >>> figure = diagram(torch.zeros(3, 600, 800), uhd_ops.plan_slices(800, 600))
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['1  slice', '2  pack', '3  compress']
    """
    if not isinstance(vit, ViTConfig):
        raise TypeError(f"vit must be a ViTConfig, got {type(vit).__name__}")
    compressor = CompressorConfig() if compressor is None else compressor
    pictures = slice_image(image, plan)
    if plan.patch_size != vit.patch:
        raise ValueError(
            f"plan must have patches of {vit.patch} px, like the encoder, got {plan.patch_size} px"
        )
    without, report = count_vit(vit, plan.grids), count_vit(vit, plan.grids, compressor)
    figure = figure_of(figure, (12.5, 5.2))
    mosaic = figure.subplot_mosaic(
        [["slice", "pack"], ["slice", "compress"]], width_ratios=(1, 1.45), height_ratios=(1, 3.2)
    )
    for picture in pictures:
        picture.thumbnail((_TILE, _TILE))
    _draw_slices(mosaic["slice"], pictures, plan)
    _draw_pack(mosaic["pack"], pictures, plan)
    _draw_blocks(mosaic["compress"], report, without, plan, compressor)
    for number, (name, axes) in enumerate(mosaic.items(), 1):
        axes.set_title(f"{number}  {name}", loc="left", fontweight="bold", color=BLUE)
    return figure


def _draw_slices(axes: Axes, pictures: list[Image.Image], plan: SlicePlan) -> None:
    """The image taken apart, its thumbnail above it."""
    width, height = plan.image_size
    gap = _GAP * max(width, height)
    rows, columns = plan.grid or (0, 0)
    # The thumbnail has the width of a slice, so that it is seen to be small.
    share = 1 / max(columns, 2)
    top = share * height + 2 * gap
    axes.imshow(pictures[0], extent=(0, share * width, share * height, 0))
    side = f"thumbnail\n{_pixels(plan.thumbnail)}"
    axes.text(share * width + gap, share * height / 2, side, va="center", fontsize=9)
    if plan.slice is not None:
        across, down = width / columns, height / rows
        for view, picture in enumerate(pictures[1:]):
            row, column = divmod(view, columns)
            left, upper = column * (across + gap), top + row * (down + gap)
            axes.imshow(picture, extent=(left, left + across, upper + down, upper))
    right, bottom = width + max(columns - 1, 0) * gap, top + height + max(rows - 1, 0) * gap
    axes.set(xlim=(-gap, right + gap), ylim=(bottom if rows else top, -gap))
    axes.set_aspect("equal")
    axes.axis("off")
    text = f"{_pixels(plan.image_size)}, not sliced"
    if plan.slice is not None:
        text = f"{_pixels(plan.image_size)} in {rows} x {columns} slices of {_pixels(plan.slice)}"
    axes.text(0.5, -0.02, text, ha="center", va="top", transform=axes.transAxes, fontsize=9)


def _draw_pack(axes: Axes, pictures: list[Image.Image], plan: SlicePlan) -> None:
    """All views one after the other, as long as they have tokens."""
    left, total = 0.0, plan.num_tokens
    for picture, (rows, columns) in zip(pictures, plan.grids, strict=True):
        across = rows * columns / total
        axes.imshow(picture, extent=(left, left + across, 0, 1), aspect="auto")
        axes.axvline(left, color="white", lw=2)
        left += across
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(), yticks=())
    axes.set_xlabel(
        f"{total:,} tokens of {plan.num_views} views in one sequence, without padding; "
        "each view attends to itself",
        fontsize=9,
    )


def _draw_blocks(
    axes: Axes,
    report: FlopReport,
    without: FlopReport,
    plan: SlicePlan,
    compressor: CompressorConfig,
) -> None:
    """A bar for each block, and how many tokens it sees."""
    before = {layer.name: layer.total for layer in without.layers}
    rows: list[Any] = list(report.layers[1:])  # the embedding of the patches is next to nothing
    full = max(layer.total for layer in (*rows, *without.layers))
    axes.bar(range(len(rows)), [before.get(r.name, 0) for r in rows], 0.85, color=GREY)
    inserted = [row.name.startswith("compressor") for row in rows]
    colors = [ORANGE if is_compressor else BLUE for is_compressor in inserted]
    axes.bar(range(len(rows)), [row.total for row in rows], 0.85, color=colors)
    first = 0
    for (_, is_compressor), group in groupby(
        zip(rows, inserted, strict=True), key=lambda pair: (pair[0].tokens, pair[1])
    ):
        count = len(list(group))
        middle = first + (count - 1) / 2
        tallest = max(max(before.get(r.name, 0), r.total) for r in rows[first : first + count])
        text = f"{count} block{'s' * (count > 1)}\n{rows[first].tokens:,} tokens"
        if is_compressor:
            text = f"{compressor.window} x {compressor.window}\nto 1"
        color = ORANGE if is_compressor else "black"
        place = (middle, tallest + 0.03 * full)
        axes.annotate(text, place, ha="center", va="bottom", fontsize=9, color=color)
        first += count
    merged = PackedGrids(plan.grids).merged(compressor.window ** len(compressor.layers)).num_tokens
    axes.set(xlim=(-0.6, len(rows) - 0.4), ylim=(0, 1.2 * full), xticks=())
    axes.set_xlabel(
        f"blocks of the encoder: {readable(without.total, 'MACs')} to "
        f"{readable(report.total, 'MACs')}, {saved(without.total, report.total)}; "
        f"{plan.num_tokens:,} to {merged:,} tokens",
        fontsize=9,
    )
    in_units(axes.yaxis, "MACs")
    axes.set_ylabel("per block; grey: without compressor", fontsize=9)
    strip_spines(axes)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"
