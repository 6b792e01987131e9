# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops encode``: from image files to visual tokens, and what the compressor saves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uhd_ops.cli import _report
from uhd_ops.cli._support import (
    non_negative_int,
    positive_int,
    require,
    seed,
    threads,
    user_errors,
)

if TYPE_CHECKING:
    from PIL import Image

    from uhd_ops.cli._measure import Run
    from uhd_ops.cli._models import Encoder
    from uhd_ops.slicing import SlicePlan

SUMMARY = "encode images with and without the early compressor"
DEFAULT_MODEL = "vit_base_patch16_siglip_512"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="timm vision transformer, see docs/models.md (default: %(default)s)",
    )
    add(
        "--layer",
        type=non_negative_int,
        default=6,
        metavar="K",
        help="0-based block after which the compressor runs (default: %(default)s)",
    )
    add(
        "--form",
        choices=("dense", "block", "tied"),
        default="dense",
        help="weight form of the compressor's MLP (default: %(default)s)",
    )
    add("--pretrained", action="store_true", help="fetch the model's weights; random otherwise")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s")
    add(
        "--max-slices",
        type=positive_int,
        default=9,
        metavar="N",
        help="cut an image into at most N slices; 1 never slices (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("uhd-ops-output"),
        metavar="DIR",
        help="folder for the results, one subfolder per image (default: %(default)s)",
    )
    add("--seed", type=seed, default=0, help="of random weights (default: %(default)s)")
    add("--threads", type=threads, help="CPU threads (default: as many as PyTorch chooses)")
    add("--json", action="store_true", help="print a JSON list with one summary per image")


def run(arguments: argparse.Namespace) -> None:
    """Encode every image; write tokens, picture and summary; print the summary.

    Raises:
        UserError: An image, the model or a package is missing or unsuitable, or the folder cannot
            be written.
    """
    require("rich", "timm", "PIL", "safetensors", "matplotlib")
    # Everything that can be wrong is tried before minutes are spent on the first image.
    images = [_load(path) for path in arguments.images]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from uhd_ops.cli import _measure
    from uhd_ops.cli._models import load_encoder

    if not arguments.json:
        _report.announce(arguments)
    encoder = load_encoder(
        arguments.model,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
        dtype=DTYPES[arguments.dtype],
    )
    with user_errors(ValueError, NotImplementedError, prefix=f"model {arguments.model}: "):
        _measure.check_compressor(encoder.vit, arguments.layer, arguments.form)
    plans = [
        _plan(path, image, encoder, arguments.max_slices)
        for path, image in zip(arguments.images, images, strict=True)
    ]
    folders = _make_folders(arguments.out, arguments.images)
    summaries = []
    for path, image, plan, folder in zip(arguments.images, images, plans, folders, strict=True):
        summary = _encode(path, image, plan, folder, encoder, arguments)
        summaries.append(summary)
        if not arguments.json:
            _report.show(summary)
    if arguments.json:
        print(json.dumps(summaries, indent=2))


def _load(path: Path) -> Image.Image:
    from uhd_ops.slicing import load_image

    with user_errors(OSError, ValueError):
        return load_image(path)


def _plan(path: Path, image: Image.Image, encoder: Encoder, max_slices: int) -> SlicePlan:
    from uhd_ops.slicing import plan_slices

    with user_errors(ValueError, prefix=f"image {str(path)!r}: "):
        return plan_slices(
            *image.size,
            max_slices=max_slices,
            scale_resolution=encoder.scale_resolution,
            patch_size=encoder.patch_size,
        )


def _make_folders(out: Path, images: list[Path]) -> list[Path]:
    """Make one folder per image, named after the file; equal names get a number."""
    folders: list[Path] = []
    for path in images:
        names = _numbered(path.stem)
        folders.append(next(out / name for name in names if out / name not in folders))
    with user_errors(OSError, prefix="cannot write the results: "):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    return folders


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _encode(
    path: Path,
    image: Image.Image,
    plan: SlicePlan,
    folder: Path,
    encoder: Encoder,
    arguments: argparse.Namespace,
) -> dict:
    from uhd_ops.cli import _measure
    from uhd_ops.slicing import pack_views, slice_image

    views = slice_image(image, plan)
    pixels, grids = pack_views(
        views, plan.patch_size, mean=encoder.mean, std=encoder.std, dtype=DTYPES[arguments.dtype]
    )
    comparison = _measure.compare(
        encoder.vit, pixels, grids, layer=arguments.layer, form=arguments.form
    )
    summary = _report.summarise(path, plan, encoder, comparison, arguments)
    with user_errors(OSError, prefix="cannot write the results: "):
        _write_tokens(folder / "tokens.safetensors", comparison.compressed, summary)
        _report.draw(folder / "slices.png", image, views[0], plan, comparison, summary)
        summary["files"] = [str(folder / name) for name in _report.FILES]
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _write_tokens(path: Path, run: Run, summary: dict) -> None:
    from safetensors.torch import save_file

    tensors = {
        "tokens": run.tokens.contiguous(),
        "grids": torch.tensor(list(run.grids), dtype=torch.int64).reshape(-1, 2),
    }
    # The format holds strings only.
    metadata = {
        key: json.dumps(summary[key])
        for key in ("image", "plan", "model", "compressor", "versions")
    }
    save_file(tensors, path, metadata=metadata)
