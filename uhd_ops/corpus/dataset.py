# SPDX-License-Identifier: Apache-2.0
"""``open_dataset``: the tokens of an encoded corpus, read where they lie on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from uhd_ops.corpus.store import INDEX
from uhd_ops.grids import PackedGrids

_OPEN_FILES = 256


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The tokens of one image.

    Attributes:
        id: Path of the image, relative to the corpus.
        tokens: ``(N, C)``, those of its views one after the other; they lie in the file of a shard
            and are read when they are used.
        grids: Their grids, one for each view.
    """

    id: str
    tokens: torch.Tensor
    grids: PackedGrids


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Tokens of several images, packed.

    Attributes:
        ids: Of the images.
        tokens: ``(N, C)``.
        grids: Their grids, one for each view.
        views_per_image: Number of views of each image.
    """

    ids: tuple[str, ...]
    tokens: torch.Tensor
    grids: PackedGrids
    views_per_image: tuple[int, ...]

    def pin_memory(self) -> EncodedBatch:
        """What a DataLoader with ``pin_memory=True`` calls."""
        return EncodedBatch(self.ids, self.tokens.pin_memory(), self.grids, self.views_per_image)


class EncodedDataset(Mapping[str, EncodedImage]):
    """The images of an encoded corpus, by id, in the order of the corpus.

    It can be pickled, and opens its files in each process anew. Images that could not be encoded
    are in ``failed`` only.

    Args:
        folder: What ``encode_dataset`` wrote.

    Attributes:
        failed: What is wrong with the images that have no tokens, by id.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.abspath(folder)
        self.failed: dict[str, str] = {}
        self._found: dict[str, tuple[str, list[list[int]]]] = {}
        with open(os.path.join(self.folder, INDEX), encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    self._note(json.loads(line))
                except (KeyError, TypeError, ValueError) as error:
                    if not line.endswith("\n"):
                        break  # a run is writing it, or was killed
                    raise ValueError(
                        f"line {number} of {INDEX} in {self.folder!r} is none of an encoded "
                        f"corpus: {error!r}"
                    ) from error
        self._files: dict[str, Any] = {}

    def _note(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "ok":
            self._found[entry["id"]] = entry["shard"], entry["grids"]
        else:
            self.failed[entry["id"]] = entry["error"]

    def __getitem__(self, key: str) -> EncodedImage:
        shard, grids = self._found[key]
        if shard not in self._files:
            from safetensors import safe_open

            if len(self._files) >= _OPEN_FILES:  # a tensor keeps its own file mapped
                self._files.pop(next(iter(self._files)))
            path = os.path.join(self.folder, os.path.basename(shard))
            self._files[shard] = safe_open(path, "pt")
        return EncodedImage(key, self._files[shard].get_tensor(key), PackedGrids(grids))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files."""
        return {**self.__dict__, "_files": {}}

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"EncodedDataset({self.folder!r}: {len(self)} images{failed})"

    def examples(self) -> EncodedExamples:
        """The same images by number, for a DataLoader."""
        return EncodedExamples(self)


class EncodedExamples(Dataset[EncodedImage]):
    """The images of an encoded corpus by number, for ``torch.utils.data.DataLoader``.

    Args:
        images: The corpus.

    Example:
        >>> images = EncodedExamples({})
        >>> loader = torch.utils.data.DataLoader(images, 8, collate_fn=EncodedExamples.collate)
        >>> list(loader)
        []
    """

    def __init__(self, images: Mapping[str, EncodedImage]) -> None:
        self.images, self._ids = images, list(images)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> EncodedImage:
        return self.images[self._ids[index]]

    @staticmethod
    def collate(images: Sequence[EncodedImage]) -> EncodedBatch:
        """Pack the tokens of several images into one sequence, without padding."""
        return EncodedBatch(
            tuple(image.id for image in images),
            torch.cat([image.tokens for image in images]),
            PackedGrids([pair for image in images for pair in image.grids]),
            tuple(image.grids.num_views for image in images),
        )


def open_dataset(folder: str | os.PathLike[str]) -> EncodedDataset:
    """Open what ``encode_dataset`` or ``uhd-ops encode-dataset`` wrote, or is writing.

    Args:
        folder: The folder that was its ``out``.

    Returns:
        A mapping from the id of an image, its path relative to the corpus, to tokens and grids.
        Nothing is read but the index before an image is asked for.

    Raises:
        FileNotFoundError: There is no index.
        ImportError: safetensors is missing, when an image is asked for.
        ValueError: The index is none of an encoded corpus.
    """
    return EncodedDataset(folder)
