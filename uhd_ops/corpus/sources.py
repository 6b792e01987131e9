# SPDX-License-Identifier: Apache-2.0
"""The images of a corpus: a folder, a glob or a text file of paths, listed in a fixed order.

Whoever wrote the folder may not be whoever encodes it. Symbolic links are therefore not followed,
and only regular files are opened: a named pipe would wait for ever.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from uhd_ops.slicing.load import readable_errors, require_pillow

_MAGIC = frozenset("*?[")
_EXIF_ORIENTATION = 0x0112


class Source(NamedTuple):
    """One image of a corpus.

    Attributes:
        id: Path relative to the corpus, with ``/``; a backslash, and a byte that is not UTF-8, are
            written as escapes, so no two files share an id.
        path: Where it is, relative to the root of the corpus; it may hold surrogates for bytes that
            are not UTF-8.
    """

    id: str
    path: str


def list_images(source: str | os.PathLike[str]) -> tuple[str, Iterator[Source]]:
    """List the images of a corpus, one at a time, always in the same order.

    Args:
        source: A folder, whose files with the suffix of an image format count, at any depth; a
            glob such as ``photos/**/*.jpg``; or a text file with a path on each line, relative to
            the folder of that file. What a glob or a text file names counts whatever its suffix.

    Returns:
        The root that paths are relative to, and the images. A folder that cannot be read, and a
        text file that is not UTF-8, are an OSError and a ValueError while the images are listed.

    Raises:
        FileNotFoundError: There is no such folder or file, and it is not a glob.
    """
    source = os.path.abspath(source)
    if os.path.isdir(source):
        suffixes = _suffixes()
        # "...png" has a suffix here, which it has not to os.path.splitext.
        images = (p for p in _walk(source) if f".{p.rpartition('.')[2].lower()}" in suffixes)
        return source, (_below(source, path) for path in images)
    if os.path.isfile(source):
        return os.path.dirname(source), _listed(source)
    parts = source.split(os.sep)
    first = next((i for i, part in enumerate(parts) if _MAGIC & set(part)), 0)
    root, pattern = os.sep.join(parts[:first]) or os.sep, tuple(parts[first:])
    if not first or not os.path.isdir(root):
        raise FileNotFoundError(
            f"{source!r} must be a folder, a glob or a text file of paths, got no such file"
        )
    found = (_below(root, path) for path in _walk(root))
    return root, (image for image in found if _matches(tuple(image.path.split(os.sep)), pattern))


def _below(root: str, path: str) -> Source:
    relative = os.path.relpath(path, root)
    return Source(_identity(relative), relative)


def _listed(file: str) -> Iterator[Source]:
    with open(file, encoding="utf-8") as lines:
        try:
            for line in lines:
                name = line.rstrip("\r\n")
                if name.strip():
                    yield Source(_identity(name), name)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file!r} must be a text file of paths in UTF-8, got {error.reason} at byte "
                f"{error.start}"
            ) from error


@functools.lru_cache(4096)
def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern, whose ``**`` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def _walk(folder: str) -> Iterator[str]:
    """All files under a folder, and links, in the order of their names' bytes."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        else:
            yield entry.path


@functools.cache
def _suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow opens."""
    image_module = require_pillow()
    known = image_module.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in image_module.OPEN)


def _identity(path: str) -> str:
    escaped = path.replace(os.sep, "/").replace("\\", "\\\\")
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: It is a link, no regular file, or cannot be opened; the text names no path.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags)
    except OSError as error:
        why = "it is a symbolic link" if os.path.islink(path) else error.strerror
        raise OSError(f"cannot be opened: {why}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("cannot be opened: it is not a regular file")
    return os.fdopen(file, "rb")


def image_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height in px of an image as :func:`uhd_ops.load_image` will turn it.

    The pixels are not decoded.

    Raises:
        ValueError: The file is not an image that Pillow knows, or a broken one.
    """
    with readable_errors("the file"), require_pillow().open(file) as image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)
