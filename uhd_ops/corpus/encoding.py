# SPDX-License-Identifier: Apache-2.0
"""Encode the images of one shard; what every worker of every engine runs."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch

from uhd_ops.corpus.plan import PlannedImage, ShardPlan
from uhd_ops.corpus.sources import open_regular
from uhd_ops.nn import SliceEncoder
from uhd_ops.slicing import load_image, pack_views, slice_image

if TYPE_CHECKING:
    from PIL import Image

METADATA = "uhd_ops"  # the one key of a shard's metadata: of two keys the order would be random


@dataclass(frozen=True, eq=False)
class CorpusModel:
    """An encoder, and what slicing has to know about it.

    Attributes:
        encoder: The encoder, on its device, in evaluation mode.
        patch_size: Side of its square patches, px.
        scale_resolution: Side that slices are cut for, px.
        mean: Of normalised pixel values, for each channel.
        std: Likewise.
        description: Identity of the model, ready for JSON; a run continues with the same model
            only.
    """

    encoder: SliceEncoder
    patch_size: int
    scale_resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: dict[str, Any]

    def bytes_per_token(self) -> float:
        """Bytes of tokens that come out for each token that goes in."""
        like = self._like()
        side = 4  # as many patches as plans have sides multiples of
        pixels = like.new_zeros((side * side, 3, self.patch_size, self.patch_size))
        with torch.inference_mode():
            tokens = self.encoder(pixels, [(side, side)]).tokens
        return tokens.nbytes / side**2

    def encode(
        self, views: list[list[Image.Image]]
    ) -> list[tuple[torch.Tensor, list[tuple[int, int]]]]:
        """Tokens and grids of each image, whose views are given."""
        like, counts = self._like(), [len(image) for image in views]
        pixels, grids = pack_views(
            itertools.chain(*views),
            self.patch_size,
            mean=self.mean,
            std=self.std,
            dtype=like.dtype,
        )
        with torch.inference_mode():
            result = self.encoder(pixels.to(like.device), grids, views_per_image=counts)
        merged = iter(result.grids)
        return [
            (tokens.cpu(), list(itertools.islice(merged, count)))
            for tokens, count in zip(result.per_image(), counts, strict=True)
        ]

    def _like(self) -> torch.Tensor:
        return next(self.encoder.parameters())


class EncodedShard(NamedTuple):
    """A shard, ready to be written.

    Attributes:
        number: Its number.
        data: The bytes of its file.
        entries: A line of the index for each image, in the order of the plan.
    """

    number: int
    data: bytes
    entries: list[dict[str, Any]]


def encode_shard(
    model: CorpusModel, root: str, shard: ShardPlan, *, max_tokens: int, readers: int
) -> EncodedShard:
    """Encode the images of a shard, batch by batch.

    Images of the next batch are read while one is encoded, and no more than those.

    Args:
        model: The model.
        root: What the paths of the images are relative to.
        shard: The images.
        max_tokens: Most tokens in a batch.
        readers: How many images are read at a time.
    """
    from safetensors.torch import save

    results: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for image in shard.images:
        if image.plan is None:
            results[image.source.id] = _failed(image, image.problem)
    for batch in _read_batches(root, shard.batches(max_tokens), readers):
        read = []
        for image, views, digest, problem in batch:
            if problem is None:
                read.append((image, views, digest))
            else:
                results[image.source.id] = _failed(image, problem, digest)
        encoded = model.encode([views for _, views, _ in read]) if read else []
        for (image, _, digest), (tokens, grids) in zip(read, encoded, strict=True):
            identity = image.source.id
            tensors[identity] = tokens.contiguous()
            results[identity] = {
                "id": identity,
                "status": "ok",
                "shard": shard.name,
                "tokens": len(tokens),
                "grids": grids,
                "image_size": image.plan.image_size,
                "digest": digest,
                "error": None,
            }
    entries = [results[image.source.id] for image in shard.images]
    data = save(tensors, {METADATA: json.dumps(entries)})
    return EncodedShard(shard.number, data, entries)


def _failed(image: PlannedImage, problem: str | None, digest: str | None = None) -> dict[str, Any]:
    return {
        "id": image.source.id,
        "status": "failed",
        "shard": None,
        "tokens": 0,
        "grids": [],
        "image_size": image.plan and image.plan.image_size,
        "digest": digest,
        "error": problem,
    }


class _Read(NamedTuple):
    """The views of an image, or what is wrong with it; and the digest of its file."""

    image: PlannedImage
    views: list[Image.Image]
    digest: str | None
    problem: str | None


def _read_batches(
    root: str, batches: list[list[PlannedImage]], readers: int
) -> Iterator[list[_Read]]:
    with ThreadPoolExecutor(readers, "uhd-ops-reader") as pool:
        ahead: collections.deque[list[Future[_Read]]] = collections.deque()
        for batch in batches:
            ahead.append([pool.submit(_read, root, image) for image in batch])
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        if ahead:
            yield [future.result() for future in ahead.popleft()]


def _read(root: str, image: PlannedImage) -> _Read:
    digest = None
    try:
        with open_regular(os.path.join(root, image.source.path)) as file:
            digest = _digest(file)
            file.seek(0)
            picture = load_image(file)
        if picture.size != image.plan.image_size:
            raise ValueError(
                "the file has changed: it has {}x{} px (width x height), and had {}x{} px when the "
                "run was planned".format(*picture.size, *image.plan.image_size)
            )
        return _Read(image, slice_image(picture, image.plan), digest, None)
    except (OSError, ValueError) as error:
        return _Read(image, [], digest, str(error))


def _digest(file: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    while piece := file.read(1 << 20):
        sha256.update(piece)
    return f"sha256:{sha256.hexdigest()}"


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use so many threads for one operator, in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ShardEncoder:
    """A worker: a model and how it encodes shards.

    Args:
        model: The model.
        root: What the paths of the images are relative to.
        max_tokens: Most tokens in a batch.
        readers: How many images are read at a time.
        threads: Threads of torch's operators. Their number decides bits, and so it is one of the
            options of a run.
    """

    def __init__(
        self, model: CorpusModel, root: str, *, max_tokens: int, readers: int, threads: int
    ) -> None:
        self.model, self.root, self.max_tokens = model, root, max_tokens
        self.readers, self.threads = readers, threads

    def encode(self, shard: ShardPlan) -> EncodedShard:
        """Encode one shard."""
        with torch_threads(self.threads):
            return encode_shard(
                self.model, self.root, shard, max_tokens=self.max_tokens, readers=self.readers
            )
