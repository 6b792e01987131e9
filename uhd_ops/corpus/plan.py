# SPDX-License-Identifier: Apache-2.0
"""Which image goes into which shard, and into which batch of it.

A matrix product rounds differently for another number of rows. So batches are fixed here, from
sizes alone, before anything is encoded: whoever encodes a shard, whenever, gets the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from uhd_ops.corpus.sources import Source, image_size, open_regular
from uhd_ops.slicing import SlicePlan, pack_batches, plan_native, plan_slices


@dataclass(frozen=True)
class Options:
    """What decides which shard and batch an image goes into.

    Attributes:
        native_tokens: Plan one view of at most so many patches, as :func:`uhd_ops.plan_native`
            does; None plans slices.
        max_slices: As for :func:`uhd_ops.plan_slices`.
        scale_resolution: Likewise, px.
        patch_size: Side of a patch, px.
        max_tokens: Most tokens in a batch, before any compression; a larger image is one alone.
        shard_bytes: Size that a shard has when it is full.
        bytes_per_token: Bytes that a shard grows by for each token of a plan.
    """

    native_tokens: int | None
    max_slices: int
    scale_resolution: int
    patch_size: int
    max_tokens: int
    shard_bytes: int
    bytes_per_token: float

    def plan(self, width: int, height: int) -> SlicePlan:
        """The views of an image, in px.

        Raises:
            ValueError: An option is out of range, or there would be too many patches.
        """
        if self.native_tokens is not None:
            options = {"max_tokens": self.native_tokens, "patch_size": self.patch_size}
            return plan_native(width, height, **options)
        return plan_slices(
            width,
            height,
            max_slices=self.max_slices,
            scale_resolution=self.scale_resolution,
            patch_size=self.patch_size,
        )


@dataclass(frozen=True)
class PlannedImage:
    """An image and its plan, or why it has none."""

    source: Source
    plan: SlicePlan | None
    problem: str | None = None


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{number:06d}.safetensors"


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard, in the order of the corpus."""

    number: int
    images: tuple[PlannedImage, ...]

    @property
    def name(self) -> str:
        """Name of the shard's file."""
        return shard_name(self.number)

    def batches(self, max_tokens: int) -> list[list[PlannedImage]]:
        """The images that have plans, in batches of at most ``max_tokens`` tokens."""
        planned = [image for image in self.images if image.plan is not None]
        tokens = [image.plan.num_tokens for image in planned]
        groups = pack_batches(tokens, max(max_tokens, *tokens, 1))
        return [[planned[index] for index in group] for group in groups]

    def to_json(self) -> str:
        """One line that :meth:`from_json` reads."""
        images = [
            [*image.source, image.plan and image.plan.to_dict(), image.problem]
            for image in self.images
        ]
        return json.dumps({"number": self.number, "images": images})

    @classmethod
    def from_json(cls, line: str) -> ShardPlan:
        """The shard of a line."""
        fields = json.loads(line)
        return cls(
            fields["number"],
            tuple(
                PlannedImage(Source(identity, path), plan and SlicePlan.from_dict(plan), problem)
                for identity, path, plan, problem in fields["images"]
            ),
        )


def plan_shards(
    root: str, sources: Iterable[Source], options: Options, first_number: int = 0
) -> Iterator[ShardPlan]:
    """Group images into shards, one shard at a time, by reading the heads of their files.

    Args:
        root: What the paths of the images are relative to.
        sources: The images.
        options: What decides.
        first_number: Number of the first shard.
    """
    number, images, size = first_number, [], 0.0
    for source in sources:
        image = _plan(root, source, options)
        grows = options.bytes_per_token * (image.plan.num_tokens if image.plan else 0)
        # Images without plans have no bytes, but an unbounded number of them makes no shard.
        if images and (size + grows > options.shard_bytes or len(images) >= _MOST_IMAGES):
            yield ShardPlan(number, tuple(images))
            number, images, size = number + 1, [], 0.0
        images.append(image)
        size += grows
    if images:
        yield ShardPlan(number, tuple(images))


_MOST_IMAGES = 4096
RESERVED = "__metadata__"  # what safetensors calls metadata, in the place of a tensor


def _plan(root: str, source: Source, options: Options) -> PlannedImage:
    if source.id == RESERVED:
        return PlannedImage(source, None, "no image of a corpus can have this name")
    try:
        with open_regular(os.path.join(root, source.path)) as file:
            size = image_size(file)
        plan = options.plan(*size)
    except (OSError, ValueError) as error:
        return PlannedImage(source, None, str(error))
    return PlannedImage(source, plan)
