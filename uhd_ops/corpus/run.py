# SPDX-License-Identifier: Apache-2.0
"""``encode_dataset``: a corpus of images, encoded once and kept."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import platform
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from uhd_ops._checks import check_int, check_positive_int
from uhd_ops.corpus.encoding import CorpusModel, EncodedShard, ShardEncoder
from uhd_ops.corpus.engines import run_local, run_ray
from uhd_ops.corpus.plan import Options, plan_shards
from uhd_ops.corpus.sources import list_images
from uhd_ops.corpus.store import Store
from uhd_ops.slicing.native_resolution import LEAST_MAX_TOKENS

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class Progress(NamedTuple):
    """What a run has done so far.

    Attributes:
        images: Images that are finished, those of earlier runs not among them.
        tokens: Tokens that were written.
        skipped: Images that earlier runs had finished.
        failed: Images that could not be encoded, now or by earlier runs.
    """

    images: int = 0
    tokens: int = 0
    skipped: int = 0
    failed: int = 0


def encode_dataset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    make_model: Callable[[], CorpusModel],
    *,
    engine: Engine = "local",
    workers: int = 1,
    threads: int = 1,
    readers: int = 1,
    max_slices: int = 9,
    native_tokens: int | None = None,
    max_tokens: int = 32768,
    shard_mb: int = 64,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Encode every image of a corpus, and write the tokens into shards.

    Called again with the same arguments, it continues where it was stopped, however that happened,
    and encodes images that were added since. A shard is written as a whole, so an image is finished
    when it is in the index; unfinished shards, at most ``workers``, are encoded again. Each engine,
    each number of workers and each order gives the same bits on processors of one kind, because
    batches are planned from sizes alone and ``threads`` is part of the run. An image that cannot be
    read is listed with the reason, and the run continues.

    Args:
        source: A folder, whose files with the suffix of an image format count, at any depth; a
            glob; or a text file with a path on each line. Symbolic links are not followed.
        out: Folder for ``shard-*.safetensors``, ``index.jsonl``, and ``run.json`` and
            ``plan.jsonl``, which a later run reads. Nothing is written elsewhere.
        make_model: Makes the model, in each worker once. Workers of other processes unpickle it.
        engine: ``"local"``, or ``"ray"`` for Ray Data on this machine or on the cluster that the
            environment variable RAY_ADDRESS names. There all nodes must see the images; shards are
            written here.
        workers: Number of models that run side by side; one local one runs in this process.
        threads: Threads of torch in each.
        readers: Threads that read images in each.
        max_slices: Largest number of slices of an image.
        native_tokens: Encode each image in one view at its own resolution instead, scaled down to
            at most so many patches, 16 or more: see :func:`uhd_ops.plan_native`.
        max_tokens: Most tokens that are encoded at once, before any compression; an image with
            more is encoded alone.
        shard_mb: Size of a shard, in units of 10^6 bytes. An image with more is a shard alone.
        report: Called after every shard.

    Returns:
        What this run did.

    Raises:
        FileNotFoundError: There is no such corpus.
        ImportError: A package is missing.
        OSError: ``out`` cannot be written, for example because the disk is full.
        RuntimeError: Another run is writing to ``out``, or a worker died.
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range, ``engine`` is neither of the two, or ``out`` holds
            something else, or a run with other options.

    Source:
        LLaVA-UHD v4, section 3.1: the encoding.
    """
    if engine not in ENGINES:
        raise ValueError(f'engine must be "local" or "ray", got {engine!r}')
    numbers = {"workers": workers, "threads": threads, "readers": readers}
    numbers |= {"max_slices": max_slices, "max_tokens": max_tokens, "shard_mb": shard_mb}
    for name, number in numbers.items():
        check_positive_int(number, name)
    if native_tokens is not None:
        check_int(native_tokens, "native_tokens", LEAST_MAX_TOKENS)
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("shards need safetensors: pip install 'uhd_ops[cli]'")
    root, images = list_images(source)
    model = make_model()
    options = Options(
        native_tokens=native_tokens,
        max_slices=max_slices,
        scale_resolution=model.scale_resolution,
        patch_size=model.patch_size,
        max_tokens=max_tokens,
        shard_bytes=shard_mb * 10**6,
        bytes_per_token=model.bytes_per_token(),
    )
    options.plan(1, 1)  # what is wrong with an option is not wrong with an image
    settings = {
        "root": root,  # of another corpus, the same id would be another image
        "model": model.description,
        "threads": threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        **vars(options),
    }
    device = next(model.encoder.parameters()).device.type
    if engine == "local" and workers == 1:
        made = model  # kept; workers of other processes make their own
        make_model = lambda: made  # noqa: E731
    del model
    make_worker = functools.partial(
        _make_worker, make_model, root, max_tokens=max_tokens, readers=readers, threads=threads
    )
    with Store(out) as store:
        store.begin(settings)
        progress = Progress(0, 0, *store.write_index())
        finished, known, count = store.finished(), set(), 0
        for shard in store.plans():
            known |= {image.source.id for image in shard.images}
            count = shard.number + 1
        left = (shard for shard in store.plans() if shard.number not in finished)
        new = (image for image in images if _is_new(image.id, known))
        added = store.add_plans(plan_shards(root, new, options, count))
        shards = itertools.chain(left, added)
        if engine == "ray":
            results = run_ray(make_worker, shards, workers, threads=threads, device=device)
        else:
            results = run_local(make_worker, shards, workers)
        for result in results:
            store.add(result)
            progress = _after(progress, result)
            if report is not None:
                report(progress)
        store.write_index()
    return progress


def _make_worker(make_model: Callable[[], CorpusModel], root: str, **options: int) -> ShardEncoder:
    return ShardEncoder(make_model(), root, **options)


def _is_new(identity: str, known: set[str]) -> bool:
    """Whether an image is named for the first time."""
    before = len(known)
    known.add(identity)
    return len(known) > before


def _after(progress: Progress, shard: EncodedShard) -> Progress:
    return progress._replace(
        images=progress.images + len(shard.entries),
        failed=progress.failed + sum(entry["status"] != "ok" for entry in shard.entries),
        tokens=progress.tokens + sum(entry["tokens"] for entry in shard.entries),
    )
