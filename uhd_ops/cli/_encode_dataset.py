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
    find_device,
    load_corpus_model,
)
from uhd_ops.cli._support import (
    require,
    user_errors,
)
from uhd_ops.cli.arguments.commands import FAILED, MOST_WORKERS

if TYPE_CHECKING:
    from uhd_ops.corpus import Progress


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
        workers = 1 if device == "cuda" else min(len(os.sched_getaffinity(0)), MOST_WORKERS)
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
