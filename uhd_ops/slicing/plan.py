# SPDX-License-Identifier: Apache-2.0
"""``SlicePlan``: the views of one image, as sizes and boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from uhd_ops._checks import check_int
from uhd_ops.slicing import _checks

Pair = tuple[int, int]
_LARGEST = 2**53  # far above every plan, and exact in a JSON number


@dataclasses.dataclass(frozen=True, repr=False)
class SlicePlan:
    """The views of one image: a thumbnail of the whole and, for a large image, a grid of slices.

    Sizes in px are (width, height); grids are (rows, columns) or (h, w) in patches. ``plan_slices``
    and ``plan_native`` make plans; a plan is immutable, hashable, and equal to another one with the
    same fields.

    Args:
        image_size: The image that was planned, (width, height) px.
        grid: Slices as (rows, columns), or None for an image that is not sliced.
        thumbnail: Size of the thumbnail, (width, height) px.
        slice: Size of each slice, (width, height) px, or None for an image that is not sliced.
        patch_size: Side of a patch in px.
        merge: View sides are multiples of ``merge`` patches.
        overlap: Patches that a slice shares with each of its neighbours, a multiple of ``merge``.

    Raises:
        TypeError: If a field is not made of integers.
        ValueError: If a number is not positive, a view side is not a multiple of ``patch_size *
            merge``, only one of ``grid`` and ``slice`` is None, or ``overlap`` is negative, no
            multiple of ``merge``, or not below a slice's side where it has a neighbour.

    Example:
        >>> plan = plan_slices(1920, 1080)
        >>> plan
        SlicePlan(image 1920x1080 px, thumbnail 616x336 px, 2x4 slices of 448x448 px, 9248 tokens)
        >>> plan.grid, plan.grids[:2]
        ((2, 4), ((24, 44), (32, 32)))
    """

    image_size: Pair
    grid: Pair | None
    thumbnail: Pair
    slice: Pair | None
    patch_size: int
    merge: int
    overlap: int = 0

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge"):
            value = check_int(getattr(self, name), name, 1, _LARGEST)
            object.__setattr__(self, name, value)
        if (self.grid is None) != (self.slice is None):
            raise ValueError(
                f"grid and slice must both be pairs or both be None, got grid = {self.grid} and "
                f"slice = {self.slice}"
            )
        pairs = ("image_size", "thumbnail") + (() if self.grid is None else ("grid", "slice"))
        for name in pairs:
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        unit = self.patch_size * self.merge
        for name, size in (("thumbnail", self.thumbnail), ("slice", self.slice)):
            if size is not None and (size[0] % unit or size[1] % unit):
                raise ValueError(
                    f"{name} must have sides that are multiples of patch_size * merge = {unit} px, "
                    f"got {size}"
                )
        overlap = _checks.overlap(self.overlap, self.merge)
        object.__setattr__(self, "overlap", overlap)
        if min(self._strides, default=1) < 1:
            raise ValueError(
                f"overlap must be below the sides of a slice of {self.slice} px, got {overlap} "
                f"patches of {self.patch_size} px"
            )

    @property
    def num_slices(self) -> int:
        """Slices without the thumbnail; 0 for an image that is not sliced."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def num_views(self) -> int:
        """Thumbnail and slices."""
        return 1 + self.num_slices

    @property
    def grids(self) -> tuple[Pair, ...]:
        """Patch grid (h, w) of each view, thumbnail first; what ``PackedGrids`` takes."""
        slices = () if self.slice is None else (self._patch_grid(self.slice),) * self.num_slices
        return (self._patch_grid(self.thumbnail), *slices)

    @property
    def num_tokens(self) -> int:
        """Patches of all views, which are the packed tokens before any compression."""
        (height, width), *_ = self.grids
        num_tokens = height * width
        if self.slice is not None:
            height, width = self._patch_grid(self.slice)
            num_tokens += self.num_slices * height * width
        return num_tokens

    @property
    def num_overlap_tokens(self) -> int:
        """Packed tokens that are there only because slices overlap, the price of ``overlap``."""
        if self.grid is None or self.slice is None:
            return 0
        height, width = self._patch_grid(self.slice)
        stride_width, stride_height = (stride // self.patch_size for stride in self._strides)
        return self.num_slices * (height * width - stride_height * stride_width)

    @property
    def num_merged_tokens(self) -> int:
        """Tokens that are left once ``merge`` x ``merge`` patches have become one."""
        return self.num_tokens // self.merge**2

    @property
    def resized_size(self) -> Pair | None:
        """Size of the resized image the slices are cut from, (width, height) px, or None."""
        if self.grid is None or self.slice is None:
            return None
        return tuple(
            (number - 1) * stride + side
            for number, stride, side in zip(self.grid[::-1], self._strides, self.slice, strict=True)
        )

    @property
    def boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(left, top, right, bottom) px of each slice in the resized image, row by row."""
        if self.grid is None or self.slice is None:
            return ()
        (rows, columns), (width, height) = self.grid, self.slice
        right, down = self._strides
        return tuple(
            (column * right, row * down, column * right + width, row * down + height)
            for row in range(rows)
            for column in range(columns)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of ints, lists and None, ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SlicePlan:
        """Rebuild a plan from ``to_dict``'s result.

        Args:
            fields: Exactly the keys that ``to_dict`` writes.

        Returns:
            A plan equal to the one that was written.

        Raises:
            TypeError: If ``fields`` is not a mapping or a value is not made of integers.
            ValueError: If keys are missing or unknown, or the values make no valid plan.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields must be a mapping, got {type(fields).__name__}")
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise ValueError(
                f"fields must have the keys {sorted(expected)}, got {sorted(map(str, fields))}"
            )
        return cls(**fields)

    def __repr__(self) -> str:
        slices = "no slices"
        if self.grid is not None and self.slice is not None:
            slices = f"{_times(self.grid)} slices of {_times(self.slice)} px"
        if self.num_overlap_tokens:
            slices += f" that share {self.overlap} patches (+{self.num_overlap_tokens} tokens)"
        return (
            f"SlicePlan(image {_times(self.image_size)} px, thumbnail {_times(self.thumbnail)} px, "
            f"{slices}, {self.num_tokens} tokens)"
        )

    @property
    def _strides(self) -> tuple[int, ...]:
        """Distance in px from a slice to the next one, across and down."""
        if self.grid is None or self.slice is None:
            return ()
        shared = self.overlap * self.patch_size
        return tuple(
            side - shared * (number > 1)
            for side, number in zip(self.slice, self.grid[::-1], strict=True)
        )

    def _patch_grid(self, size: Pair) -> Pair:
        return size[1] // self.patch_size, size[0] // self.patch_size


def _pair(name: str, value: Any) -> Pair:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a pair of integers, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair of integers, got {len(value)} values: {value!r}")
    first, second = (check_int(side, name, 1, _LARGEST) for side in value)
    return first, second


def _times(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"
