# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops encode-dataset``: a corpus of images into shards of visual tokens."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from typing import TYPE_CHECKING

from uhd_ops.cli._models import (
    DTYPES,
    add_model_arguments,
    find_device,
    load_corpus_model,
)
from uhd_ops.cli._support import (
    positive_int,
    require,
    threads,
    user_errors,
)

if TYPE_CHECKING:
    from uhd_ops.corpus import Progress

SUMMARY = "encode a corpus of images into shards, once"
FAILED = 3  # exit code of --strict
_MOST_WORKERS = 4  # by default: each holds a model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("source", metavar="SRC", help="folder, glob, or text file with a path on each line")
    add("--out", required=True, metavar="OUT", help="folder for shards and index; runs resume")
    add_model_arguments(parser)
    add(
        "--max-tokens",
        type=positive_int,
        default=32768,
        metavar="N",
        help="encode at most N tokens at a time, before compression (default: %(default)s)",
    )
    add(
        "--shard-mb",
        type=positive_int,
        default=64,
        metavar="MB",
        help="size of a shard in 10^6 bytes (default: %(default)s)",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what starts the workers (default: %(default)s)",
    )
    add(
        "--workers",
        type=threads,
        metavar="N",
        help=f"models side by side (default: 1 on a GPU, else one a core up to {_MOST_WORKERS})",
    )
    add(
        "--threads",
        type=threads,
        default=1,
        help="CPU threads of each worker; other numbers give other last bits (default: 1)",
    )
    add("--strict", action="store_true", help=f"exit with {FAILED} if an image cannot be encoded")
    add("--json", action="store_true", help="print the counts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Encode a corpus and print what was done.

    Returns:
        The exit code.

    Raises:
        UserError: An argument or a package is missing or unsuitable, or the folder cannot be
            written.
    """
    require("rich", "timm", "PIL", "safetensors")
    if arguments.engine == "ray":
        require("ray", extra="ray")
    from uhd_ops.corpus import encode_dataset

    device = find_device(arguments.device)
    workers = arguments.workers
    if workers is None:
        workers = 1 if device == "cuda" else min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    make_model = functools.partial(
        load_corpus_model,
        arguments.model,
        layer=arguments.layer,
        form=arguments.form,
        pretrained=arguments.pretrained,
        seed=arguments.seed,
        dtype=DTYPES[arguments.dtype],
        device=device,
    )
    with user_errors(ImportError, OSError, RuntimeError, ValueError):
        progress = _with_status(
            arguments,
            functools.partial(
                encode_dataset,
                arguments.source,
                arguments.out,
                make_model,
                engine=arguments.engine,
                workers=workers,
                threads=arguments.threads,
                readers=4 if device == "cuda" else 1,
                max_slices=arguments.max_slices,
                native_tokens=arguments.native,
                max_tokens=arguments.max_tokens,
                shard_mb=arguments.shard_mb,
            ),
        )
    if arguments.json:
        print(json.dumps({**progress._asdict(), "out": arguments.out}))
    else:
        print(f"{_in_words(progress)}; see {os.path.join(arguments.out, 'index.jsonl')}")
    return FAILED if arguments.strict and progress.failed else 0


def _with_status(arguments: argparse.Namespace, encode: functools.partial[Progress]) -> Progress:
    """Encode, and show on the terminal how far it is."""
    if arguments.json or not sys.stderr.isatty():
        return encode()
    from rich.console import Console

    with Console(stderr=True).status("loading the model") as status:
        return encode(report=lambda progress: status.update(_in_words(progress)))


def _in_words(progress: Progress) -> str:
    text = f"{progress.images} images encoded into {progress.tokens} tokens"
    if progress.skipped:
        text += f", {progress.skipped} found from before"
    return f"{text}, {progress.failed} failed"
