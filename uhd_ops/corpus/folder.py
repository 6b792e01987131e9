# SPDX-License-Identifier: Apache-2.0
"""A folder that results are written to, and nothing outside of it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

UNFINISHED = ".unfinished"


class Folder:
    """A folder, by its descriptor: whoever renames or replaces its path changes nothing here.

    It may be reached through links, but none inside is followed, and names have no ``/``. It is a
    context manager.

    Args:
        path: Where; it is made if it is not there.

    Raises:
        OSError: It cannot be made or opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        os.makedirs(self.path, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def names(self) -> list[str]:
        """Names of what is in it."""
        return os.listdir(self.descriptor)

    def folder(self, name: str) -> Folder:
        """The folder of that name inside, which is made if it is not there.

        Raises:
            OSError: It is a link, or something else than a folder.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.descriptor)
        inner = Folder.__new__(Folder)
        inner.path = os.path.join(self.path, name)
        inner.descriptor = self._open(name, os.O_RDONLY | os.O_DIRECTORY)
        return inner

    def open(self, name: str, flags: int) -> int:
        """Open a regular file, as :func:`os.open` does.

        Raises:
            FileNotFoundError: There is none, and ``flags`` do not say that it is made.
            OSError: It is a link or no regular file, or cannot be opened.
        """
        descriptor = self._open(name, flags | os.O_NONBLOCK)  # a pipe would wait for its other end
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"cannot open {name!r} in {self.path!r}: it is not a regular file")
        return descriptor

    def read(self, name: str) -> bytes | None:
        """Contents of a file; None if it is not there."""
        try:
            descriptor = self.open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file under another name, and give it its own when all of it is on the disk."""
        unfinished = f".{name}{UNFINISHED}"
        self.remove(unfinished)
        descriptor = self.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            self.remove(unfinished)
            raise
        os.fsync(self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, or a link, that may be there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, 0o644, dir_fd=self.descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            why = error.strerror
            if os.path.islink(os.path.join(self.path, name)):
                why = "it is a symbolic link, and none is followed"
            raise OSError(f"cannot open {name!r} in {self.path!r}: {why}") from error
