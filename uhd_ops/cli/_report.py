# SPDX-License-Identifier: Apache-2.0
"""The summary of one encoded image: as a dict for JSON, and as a table for people."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import uhd_ops

if TYPE_CHECKING:
    from uhd_ops.cli._measure import Comparison
    from uhd_ops.cli._models import Encoder
    from uhd_ops.slicing import SlicePlan

FILES = ("tokens.safetensors", "slices.png", "summary.json")
_OPS = ("window_attention", "pixel_unshuffle_mlp")


def summarise(
    path: Path,
    plan: SlicePlan,
    encoder: Encoder,
    comparison: Comparison,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return everything that ``summary.json`` holds but the paths of the files."""
    info = uhd_ops.build_info()
    without, compressed = comparison.without, comparison.compressed
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
        "giga_macs": {"without": without.giga_macs, "with": compressed.giga_macs},
        "seconds": {"without": without.seconds, "with": compressed.seconds},
        "threads": torch.get_num_threads(),
        "backends": {op: info.backends[op]["cpu"] for op in _OPS},
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
    costs.add_row("seconds", *(f"{s:.2f}" for s in seconds.values()), _saved(*seconds.values()))
    for column in costs.columns[1:]:
        column.justify = "right"
    Console().print(costs)
    for file in summary["files"]:
        print(f"wrote {file}")


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    plan, model, compressor = summary["plan"], summary["model"], summary["compressor"]
    views = f"thumbnail {_times(plan['thumbnail'])} px"
    if plan["grid"]:
        views += f", {_times(plan['grid'])} slices of {_times(plan['slice'])} px"
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
