# SPDX-License-Identifier: Apache-2.0
"""The folder of an encoded corpus: what is in it, and how it is written.

A shard's file, with the entries of its images in its metadata, is all that has to be written at
once: it is there, whole, or it is not. The index is made of shards again whenever a run starts, so
no kill can leave the two apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from uhd_ops.corpus.encoding import METADATA, EncodedShard
from uhd_ops.corpus.folder import UNFINISHED, Folder
from uhd_ops.corpus.plan import ShardPlan, shard_name

RUN, PLAN, INDEX, LOCK = "run.json", "plan.jsonl", "index.jsonl", ".lock"
_SHARD = re.compile(r"shard-(\d{6,})\.safetensors")
_LARGEST_HEADER = 100_000_000  # bytes; what the format allows


class Store:
    """The folder that one run writes; a context manager.

    Args:
        folder: Where; it is made if it is not there. It may be reached through links, but holds
            none that are followed.

    Raises:
        OSError: The folder cannot be made or opened.
        RuntimeError: Another run is writing to it.
        ValueError: It holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Folder(folder)
        self._lock = -1
        try:
            foreign = sorted(name for name in self._folder.names() if not _is_own(name))
            if foreign:
                raise ValueError(
                    f"{self.path!r} must be empty or hold an encoded corpus, and holds "
                    f"{foreign[0]!r}"
                )
            self._lock = self._folder.open(LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another run is writing to {self.path!r}") from error
            for name in self._folder.names():
                if name.endswith(UNFINISHED):
                    self._folder.remove(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        """Where the folder is."""
        return self._folder.path

    def close(self) -> None:
        """Let other runs write."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._folder.close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Write what the run is made of, or compare it with what an earlier one was made of.

        Raises:
            ValueError: The earlier run had other settings.
        """
        text = self._folder.read(RUN)
        if text is None:
            self._folder.write(RUN, [json.dumps(settings, indent=2).encode() + b"\n"])
            return
        before, now = json.loads(text), json.loads(json.dumps(settings))
        differ = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if differ:
            name = differ[0]
            raise ValueError(
                f"{self.path!r} holds a run with {name} = {before.get(name)!r}, got "
                f"{now.get(name)!r}; choose another folder, or the same options"
            )

    def plans(self) -> Iterator[ShardPlan]:
        """The shards that were planned, one at a time."""
        text = self._folder.read(PLAN)
        for line in (text or b"").splitlines(keepends=True):
            if line.endswith(b"\n"):  # the last one may have been cut off by a kill
                yield ShardPlan.from_json(line.decode())

    def add_plans(self, shards: Iterable[ShardPlan]) -> Iterator[ShardPlan]:
        """Write plans behind those that are there, and hand on each that is on the disk."""
        descriptor = self._folder.open(PLAN, os.O_RDWR | os.O_CREAT)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(_whole_lines(file))
            file.seek(0, os.SEEK_END)
            for shard in shards:
                file.write(shard.to_json().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                yield shard

    def finished(self) -> set[int]:
        """Numbers of the shards that are there."""
        return {int(match[1]) for name in self._folder.names() if (match := _SHARD.fullmatch(name))}

    def add(self, shard: EncodedShard) -> None:
        """Write a shard, and then its lines of the index."""
        self._folder.write(shard_name(shard.number), [shard.data])
        descriptor = self._folder.open(INDEX, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(descriptor, "ab") as file:
            file.write(_lines(shard.entries))

    def write_index(self) -> tuple[int, int]:
        """Write the index anew, in the order of the shards, from what shards say of themselves.

        Returns:
            The number of images in it, and how many of them failed.
        """
        images = failed = 0

        def lines() -> Iterator[bytes]:
            nonlocal images, failed
            for number in sorted(self.finished()):
                entries = self._entries(shard_name(number))
                images += len(entries)
                failed += sum(entry["status"] != "ok" for entry in entries)
                yield _lines(entries)

        self._folder.write(INDEX, lines())
        return images, failed

    def _entries(self, name: str) -> list[dict[str, Any]]:
        with os.fdopen(self._folder.open(name, os.O_RDONLY), "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > _LARGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
                return json.loads(header["__metadata__"][METADATA])
            except (KeyError, TypeError, ValueError, struct.error) as error:
                raise ValueError(
                    f"{name} in {self.path!r} is not a shard of an encoded corpus: {error}"
                ) from error


def _is_own(name: str) -> bool:
    known = name in (RUN, PLAN, INDEX, LOCK) or bool(_SHARD.fullmatch(name))
    return known or (name.startswith(".") and name.endswith(UNFINISHED))


def _lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


def _whole_lines(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
