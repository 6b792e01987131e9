# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops encode``: from image files to visual tokens, with a report of each image."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uhd_ops.cli import _report
from uhd_ops.cli._models import (
    DTYPES,
    Encoder,
    find_device,
    load_encoder,
)
from uhd_ops.cli._support import (
    UserError,
    require,
    user_errors,
)

if TYPE_CHECKING:
    from PIL import Image

    from uhd_ops.cli._measure import Run
    from uhd_ops.corpus.folder import Folder
    from uhd_ops.slicing import SlicePlan


def run(arguments: argparse.Namespace) -> None:
    """Encode every image; write tokens, picture and summary; print the summary.

    An image that cannot be encoded is reported, and the others are encoded.

    Raises:
        UserError: The model or a package is missing or unsuitable, the folder cannot be written, or
            an image could not be encoded.
    """
    require("rich", "timm", "PIL", "safetensors", "matplotlib")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from uhd_ops.cli import _measure
    from uhd_ops.corpus.folder import Folder

    device = find_device(arguments.device)
    # Everything that can be wrong is tried before minutes are spent on a model and an image.
    sizes = {path: _open(path) for path in arguments.images}
    if all(isinstance(found, UserError) for found in sizes.values()):
        raise next(iter(sizes.values()))
    if not arguments.json:
        _report.announce(arguments)
    encoder = load_encoder(
        arguments.model,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
        dtype=DTYPES[arguments.dtype],
    )
    encoder.vit.to(device)
    with user_errors(ValueError, NotImplementedError, prefix=f"model {arguments.model}: "):
        _measure.check_compressor(encoder.vit, arguments.layer, arguments.form)
    summaries, count = [], len(arguments.images)
    done = []
    with user_errors(OSError, prefix="cannot write the results: "), Folder(arguments.out) as out:
        names = _names(arguments.images)
        for number, (path, name) in enumerate(zip(arguments.images, names, strict=True), 1):
            title = path.name if count == 1 else f"{number} of {count}, {path.name}"
            try:
                summary = _encode(path, out, name, title, encoder, arguments)
            except UserError as error:
                if count == 1:
                    raise
                summary = {"image": str(path), "error": str(error)}
                print(f"uhd-ops encode: {error}", file=sys.stderr)
            else:
                done.append(summary)
                if not arguments.json and count > 1:
                    _report.show_one_of_many(summary, first=len(done) == 1)
            summaries.append(summary)
    if arguments.json:
        print(json.dumps(summaries, indent=2))
    elif count == 1:
        _report.show(done[0])
    elif done:
        _report.show_all(done, arguments.out)
    if len(done) < count:
        raise UserError(f"{count - len(done)} of {count} images could not be encoded")


def _open(path: Path) -> UserError | None:
    """What is wrong with an image as far as its head tells."""
    from uhd_ops.corpus.sources import image_size

    try:
        prefix = f"image {str(path)!r}: "
        with user_errors(OSError), open(path, "rb") as file, user_errors(ValueError, prefix=prefix):
            image_size(file)
    except UserError as error:
        return error
    return None


def _load(path: Path) -> Image.Image:
    from uhd_ops.slicing import load_image

    with user_errors(OSError, ValueError):
        return load_image(path)


def _plan(
    path: Path, image: Image.Image, encoder: Encoder, arguments: argparse.Namespace
) -> SlicePlan:
    from uhd_ops.slicing import plan_native, plan_slices

    patch_size = encoder.patch_size
    if arguments.native is not None:
        return plan_native(*image.size, max_tokens=arguments.native, patch_size=patch_size)
    with user_errors(ValueError, prefix=f"image {str(path)!r}: "):
        return plan_slices(
            *image.size,
            max_slices=arguments.max_slices,
            scale_resolution=encoder.scale_resolution,
            patch_size=patch_size,
        )


def _names(images: list[Path]) -> list[str]:
    """A folder's name for each image, after the file; equal names get a number."""
    names: list[str] = []
    for path in images:
        # A file may be called "...png"; a folder called ".." is another one.
        stem = path.stem.strip(".") or "image"
        names.append(next(name for name in _numbered(stem) if name not in names))
    return names


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _encode(
    path: Path,
    out: Folder,
    name: str,
    title: str,
    encoder: Encoder,
    arguments: argparse.Namespace,
) -> dict:
    from uhd_ops.cli import _measure
    from uhd_ops.slicing import pack_views, slice_image

    image = _load(path)
    plan = _plan(path, image, encoder, arguments)
    views = slice_image(image, plan)
    pixels, grids = pack_views(
        views, plan.patch_size, mean=encoder.mean, std=encoder.std, dtype=DTYPES[arguments.dtype]
    )
    runs = _measure.measure(
        encoder.vit,
        pixels.to(next(encoder.vit.parameters()).device),
        grids,
        layer=arguments.layer,
        form=arguments.form,
        compare=arguments.compare,
        title=title,
    )
    summary = _report.summarise(path, plan, encoder, runs, arguments)
    picture = io.BytesIO()
    _report.draw(picture, image, plan, runs, summary)
    with out.folder(name) as folder:
        summary["files"] = [str(arguments.out / name / file) for file in _report.FILES]
        contents = (
            _tokens(runs.compressed, summary),
            picture.getvalue(),
            f"{json.dumps(summary, indent=2)}\n".encode(),
        )
        for file, content in zip(_report.FILES, contents, strict=True):
            folder.write(file, [content])
    return summary


def _tokens(run: Run, summary: dict) -> bytes:
    from safetensors.torch import save

    tensors = {
        "tokens": run.tokens.cpu().contiguous(),
        "grids": torch.tensor(list(run.grids), dtype=torch.int64).reshape(-1, 2),
    }
    # The format holds strings only.
    metadata = {
        key: json.dumps(summary[key])
        for key in ("image", "plan", "model", "compressor", "versions")
    }
    return save(tensors, metadata)
