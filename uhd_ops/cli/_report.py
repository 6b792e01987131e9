# SPDX-License-Identifier: Apache-2.0
"""The summaries of encoded images: dicts for JSON, tables for people, and ``slices.png``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

import uhd_ops
from uhd_ops import plot
from uhd_ops.plot.figures import saved

if TYPE_CHECKING:
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
    """Print all of one image and the paths of its files."""
    # Plain text for what may hold a path: rich would fold it and read markup into its brackets.
    for name, value in (*_of_image(summary), *_of_run(summary)):
        print(f"{name:<27}{value}")
    _show_costs([summary])
    for file in summary["files"]:
        print(f"wrote {file}")


def show_one_of_many(summary: dict[str, Any], *, first: bool) -> None:
    """Print one line of an image; before the first, what is the same for all of them."""
    if first:
        for name, value in _of_run(summary):
            print(f"{name:<27}{value}")
    tokens = summary["tokens"]
    print(
        f"{summary['image']}: {_times(summary['plan']['image_size'])} px, "
        f"{summary['views']} view{'s' * (summary['views'] > 1)}, {tokens['in']} to "
        f"{tokens['out']} tokens, {plot.readable(summary['seconds']['with'], 's')}",
        flush=True,
    )


def show_all(summaries: list[dict[str, Any]], out: Path) -> None:
    """Print what many images took together, and where their files are."""
    _show_costs(summaries)
    print(f"wrote {', '.join(FILES)} for each of {len(summaries)} images into folders of {out}")


def _show_costs(summaries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def total(*keys: str) -> float:
        values = summaries
        for key in keys:
            values = [value[key] for value in values]
        return sum(values)

    costs = Table("", "without compressor", "with compressor", "")
    tokens_in, tokens_out = total("tokens", "in"), total("tokens", "out")
    costs.add_row("tokens out", str(tokens_in), str(tokens_out), saved(tokens_in, tokens_out))
    for name, key, unit in (
        ("MACs", "giga_macs", "MACs"),
        ("time", "seconds", "s"),
    ):
        factor = 1e9 if key == "giga_macs" else 1
        with_it = factor * total(key, "with")
        if all("without" in summary[key] for summary in summaries):
            without = factor * total(key, "without")
            cells = plot.readable(without, unit), plot.readable(with_it, unit)
            costs.add_row(name, *cells, saved(without, with_it))
        else:
            costs.add_row(name, "not run", plot.readable(with_it, unit), "")
    for column in costs.columns[1:]:
        column.justify = "right"
    Console().print(costs)


def _of_image(summary: dict[str, Any]) -> list[tuple[str, str]]:
    plan = summary["plan"]
    views = f"whole image at {_times(plan['thumbnail'])} px"
    if plan["grid"]:
        slices = f"{_times(plan['grid'])} slices of {_times(plan['slice'])} px"
        views = f"thumbnail {_times(plan['thumbnail'])} px, {slices}"
    return [
        ("image", f"{summary['image']}, {_times(plan['image_size'])} px"),
        ("views", f"{summary['views']}: {views}"),
        ("tokens in", str(summary["tokens"]["in"])),
    ]


def _of_run(summary: dict[str, Any]) -> list[tuple[str, str]]:
    model, compressor = summary["model"], summary["compressor"]
    return [
        ("model", f"{model['name']}, {model['depth']} blocks, {model['dtype']}"),
        ("weights", model["weights"]),
        ("compressor", f"after layer {compressor['layer']}, {compressor['form']} MLP"),
        *((f"{op} ran on", backend) for op, backend in summary["backends"].items()),
        ("threads", str(summary["threads"])),
    ]


def _times(pair: list[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


# ---- the picture: image, slice grid, and the tokens of both runs --------------------------------


def draw(
    file: BinaryIO, image: Image.Image, plan: SlicePlan, runs: Runs, summary: dict[str, Any]
) -> None:
    """Write the picture of one encoded image.

    Args:
        file: Where the PNG is written.
        image: The image as loaded.
        plan: Its views.
        runs: For the norms of its tokens.
        summary: For the captions.
    """
    # A figure without pyplot needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    figure = plot.merge(
        runs.norms_before,
        runs.norms_after,
        plan.grids,
        plan,
        label="L2 norm of a token",
        image=image,
        figure=Figure(),
    )
    model, layer = summary["model"], summary["compressor"]["layer"]
    name = Path(summary["image"]).name
    figure.suptitle(
        f"{name}, {model['name']} after layer {layer}, weights: {model['weights']}", fontsize=11
    )
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)
