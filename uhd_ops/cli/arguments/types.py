# SPDX-License-Identifier: Apache-2.0
"""Types of arguments, for argparse: functions of a text that raise ArgumentTypeError."""

from __future__ import annotations

import argparse

LEAST_NATIVE_TOKENS = 16  # patches that become one token
VARIANTS = {
    "none": "slices, the tower untouched, a connector that merges 2x2 tokens",
    "early": "slices, a compressor in the tower, the same connector",
    "post": "slices, the tower untouched, a connector that merges 2x2 tokens twice",
    "progressive": "slices, two poolings in the tower, a connector that merges nothing",
    "native": "as post, but the whole image in one view",
}
"""Ways to encode an image that ``uhd-ops profile`` compares."""


def positive_int(text: str) -> int:
    """Argparse type: an int of at least 1."""
    value = non_negative_int(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def threads(text: str) -> int:
    """Argparse type: a number of CPU threads; many thousands would crash the process."""
    return _at_most(positive_int(text), 1024)


def seed(text: str) -> int:
    """Argparse type: a seed of torch's random generator."""
    return _at_most(non_negative_int(text), 2**64 - 1)


def _at_most(value: int, largest: int) -> int:
    if value > largest:
        raise argparse.ArgumentTypeError(f"must be at most {largest}, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """Argparse type: an int of at least 0."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def native_tokens(text: str) -> int:
    """Argparse type: the budget of a view."""
    try:
        tokens = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens, got {text!r}; images stand before --native, or behind "
            "its number"
        ) from None
    if tokens < LEAST_NATIVE_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_NATIVE_TOKENS}, got {tokens}")
    return tokens


def sides(text: str) -> tuple[int, int]:
    """Argparse type: two sides of at least 1."""
    first, _, second = text.partition("x")
    try:
        sides = int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 32x32, got {text!r}") from None
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must have sides of at least 1, got {text!r}")
    return sides


def indices(text: str) -> list[int]:
    """Argparse type: 0-based indices of blocks, separated by commas."""
    return [non_negative_int(part) for part in text.split(",")]


def grids(text: str) -> list[tuple[int, int]]:
    """Argparse type: patch grids separated by commas."""
    grids = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        try:
            grids.append((int(height), int(width)))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must look like 32x32,28x36, got {text!r}") from None
        if min(grids[-1]) < 1:
            raise argparse.ArgumentTypeError(f"must have sides of at least 1, got {text!r}")
    return grids


def sizes(text: str) -> list[tuple[int, int]]:
    """Argparse type: sides, sizes WxH and ranges of sides, separated by commas."""
    every: list[tuple[int, int]] = []
    for part in text.split(","):
        try:
            if ":" in part:
                first, last, step = (int(number) for number in part.split(":"))
                if step < 1 or last < first:
                    raise ValueError
                found = [(side, side) for side in range(first, last + 1, step)]
            else:
                width, _, height = part.partition("x")
                found = [(int(width), int(height if "x" in part else width))]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must look like 448, 1920x1080 or 224:2240:112, separated by commas, got {part!r}"
            ) from None
        if min(map(min, found)) < 1:
            raise argparse.ArgumentTypeError(f"must have sides of at least 1, got {part!r}")
        every += [size for size in found if size not in every]
    return every


def variants(text: str) -> list[str]:
    """Argparse type: names of variants, separated by commas."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(
                f"must be some of {', '.join(VARIANTS)}, separated by commas, got {name!r}"
            )
    return names
