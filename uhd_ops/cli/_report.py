# SPDX-License-Identifier: Apache-2.0
"""The summary of one encoded image: a dict for JSON, a table for people, and ``slices.png``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

import uhd_ops

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from PIL import Image

    from uhd_ops.cli._measure import Runs
    from uhd_ops.cli._models import Encoder
    from uhd_ops.slicing import SlicePlan

FILES = ("tokens.safetensors", "slices.png", "summary.json")
_OPS = ("window_attention", "pixel_unshuffle_mlp")


def summarise(
    path: Path,
    plan: SlicePlan,
    encoder: Encoder,
    runs: Runs,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return everything that ``summary.json`` holds but the paths of the files."""
    info = uhd_ops.build_info()
    without, compressed = runs.without, runs.compressed
    seconds = {"with": compressed.seconds}
    if without is not None:
        seconds = {"without": without.seconds, **seconds}
    device = compressed.tokens.device.type
    return {
        "image": str(path),
        "plan": plan.to_dict(),
        "views": plan.num_views,
        "model": {
            "name": arguments.model,
            "depth": encoder.depth,
            "weights": encoder.weights,
            "dtype": arguments.dtype,
        },
        "compressor": {"layer": arguments.layer, "form": arguments.form},
        "tokens": {"in": plan.num_tokens, "out": len(compressed.tokens)},
        "giga_macs": {"without": runs.giga_macs_without, "with": compressed.giga_macs},
        "seconds": seconds,
        "device": device,
        "threads": torch.get_num_threads(),
        "backends": {op: info.backends[op][device] for op in _OPS},
        "versions": info.versions,
    }


def announce(arguments: argparse.Namespace) -> None:
    """Say before the long part what is about to run."""
    weights = "pretrained weights" if arguments.pretrained else "RANDOM weights (no --pretrained)"
    print(f"{arguments.model}, {weights}, {arguments.dtype}")


def show(summary: dict[str, Any]) -> None:
    """Print the summary and the paths of the files."""
    from rich.console import Console
    from rich.table import Table

    # Plain text for what may hold a path: rich would fold it and read markup into its brackets.
    for name, value in _facts(summary):
        print(f"{name:<27}{value}")
    costs = Table("", "without compressor", "with compressor", "saved")
    tokens, macs, seconds = summary["tokens"], summary["giga_macs"], summary["seconds"]
    costs.add_row("tokens out", str(tokens["in"]), str(tokens["out"]), _saved(*tokens.values()))
    costs.add_row("GMACs", *(f"{value:.1f}" for value in macs.values()), _saved(*macs.values()))
    if len(seconds) == 2:
        costs.add_row("seconds", *(f"{s:.2f}" for s in seconds.values()), _saved(*seconds.values()))
    else:
        costs.add_row("seconds", "not run", f"{seconds['with']:.2f}", "")
    for column in costs.columns[1:]:
        column.justify = "right"
    Console().print(costs)
    for file in summary["files"]:
        print(f"wrote {file}")


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    plan, model, compressor = summary["plan"], summary["model"], summary["compressor"]
    views = f"whole image at {_times(plan['thumbnail'])} px"
    if plan["grid"]:
        slices = f"{_times(plan['grid'])} slices of {_times(plan['slice'])} px"
        views = f"thumbnail {_times(plan['thumbnail'])} px, {slices}"
    return [
        ("image", f"{summary['image']}, {_times(plan['image_size'])} px"),
        ("views", f"{summary['views']}: {views}"),
        ("model", f"{model['name']}, {model['depth']} blocks, {model['dtype']}"),
        ("weights", model["weights"]),
        ("compressor", f"after layer {compressor['layer']}, {compressor['form']} MLP"),
        ("tokens in", str(summary["tokens"]["in"])),
        *((f"{op} ran on", backend) for op, backend in summary["backends"].items()),
        ("threads", str(summary["threads"])),
    ]


def _times(pair: list[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _saved(before: float, after: float) -> str:
    return f"{1 - after / before:.1%}"


# ---- the picture: image, slice grid, thumbnail, and the tokens of both runs ----------------------

_WIDEST = 1600  # px; the panel that shows the image has fewer
_LINE = {"color": "white", "linewidth": 1.2}


def draw(
    file: BinaryIO,
    image: Image.Image,
    thumbnail: Image.Image,
    plan: SlicePlan,
    runs: Runs,
    summary: dict[str, Any],
) -> None:
    """Write the picture of one encoded image.

    Args:
        file: Where the PNG is written.
        image: The image as loaded.
        thumbnail: Its first view.
        plan: Its views.
        runs: For the norms of its tokens.
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
    name = "thumbnail" if plan.grid else "whole image"
    top_right.set_title(f"{name}, {thumbnail.width}x{thumbnail.height} px")
    before = norm_map(runs.norms_before, plan.grids, plan.grid)
    after = norm_map(runs.norms_after, runs.compressed.grids, plan.grid)
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
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)


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
