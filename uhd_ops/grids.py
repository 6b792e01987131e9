# SPDX-License-Identifier: Apache-2.0
"""The patch grids of packed views, and the tables that the kernels read.

Everything is computed from Python integers, once, and cached: no operator ever reads a grid back
from a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes

from uhd_ops._checks import check_int, is_int

Grids: TypeAlias = "PackedGrids | Sequence[Sequence[int]] | Sequence[int] | torch.Tensor"

_EXPECTED = (
    "grids must be a PackedGrids, a sequence of (h, w) pairs, one (h, w) pair, "
    "or a CPU integer tensor or array of shape (S, 2)"
)
# Window sides whose counts are ready before torch.compile traces: the dictionary look-up then stays
# symbolic.
_COMMON_WINDOWS = (1, 2, 4)


class PackedGrids:
    """The grids ``(h, w)`` of the views in one packed sequence, in order. Immutable and hashable.

    Args:
        grids: A sequence of ``(h, w)`` pairs, in tokens, or a CPU integer tensor or array ``(S,
            2)``. No view, and views with a zero side, are allowed: they hold no tokens.

    Raises:
        TypeError: ``grids`` is none of these, or holds something that is not an integer.
        ValueError: A side is negative, the shape is not ``(S, 2)``, or the tensor is on another
            device.

    Example:
        >>> grids = PackedGrids([(32, 32), (28, 36)])
        >>> grids.num_tokens, grids.merged(2), grids.num_windows(2)
        (2032, PackedGrids([(16, 16), (14, 18)]), 508)
    """

    num_views: int
    num_tokens: int

    def __init__(self, grids: Sequence[Sequence[int]] | torch.Tensor) -> None:
        pairs = pairs_of(grids)
        put = functools.partial(object.__setattr__, self)
        put("_pairs", pairs)
        put("num_views", len(pairs))
        put("num_tokens", sum(h * w for h, w in pairs))
        put("_windows", {f: _count_windows(pairs, f) for f in _COMMON_WINDOWS})
        # The extra last row keeps the length above one: torch.compile specialises on "exactly one
        # view" otherwise.
        with _outlives_modes():
            put("_rows", torch.tensor([*pairs, (0, 0)], dtype=torch.int64, device="cpu"))
        put("_tables", {})

    @classmethod
    def of(cls, grids: Grids, batch: int = 1) -> PackedGrids:
        """Return ``grids`` in any accepted form as one object; a pair stands ``batch`` times."""
        if isinstance(grids, PackedGrids):
            return grids if batch == 1 else cls(grids._pairs * batch)
        pairs = pairs_of(grids)
        return _cached(pairs if batch == 1 else pairs * batch)

    def num_windows(self, window: int) -> int:
        """Number of windows of side ``window``, the ragged ones included."""
        window = check_int(window, "window", 1)  # 2.0 and True would be found as well
        count = self._windows.get(window)
        return _count_windows(self._pairs, window) if count is None else count

    def merged(self, factor: int = 2) -> PackedGrids:
        """Grids of the merged tokens: ``(ceil(h / factor), ceil(w / factor))`` of each view."""
        factor = check_int(factor, "factor", 1)
        return _cached(tuple((-(-h // factor), -(-w // factor)) for h, w in self._pairs))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the largest view; 0 if there is none."""
        return max((h * w for h, w in self._pairs), default=0)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return where each view starts, ``(S + 1,)`` int32, for variable-length attention."""
        key = ("cu_seqlens", torch.device(device))
        with _outlives_modes():
            if key not in self._tables:
                lengths = torch.tensor([0, *(h * w for h, w in self._pairs)], device="cpu")
                self._tables[key] = lengths.cumsum(0).to(dtype=torch.int32, device=device)
            return self._tables[key].clone()  # the caller may change it

    def coordinates(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return row and column of every token in its view, ``(N, 2)`` float32, in raster order.

        Rotary position embeddings are made from them. For merged tokens, ``window_mean`` of them
        gives the windows' centres, and ``merged(factor).coordinates()`` numbers them anew.
        """
        key = ("coordinates", torch.device(device))
        with _outlives_modes():
            if key not in self._tables:
                views = [torch.empty((0, 2), device="cpu")]
                for h, w in self._pairs:
                    token = torch.arange(h * w, device="cpu")
                    views.append(torch.stack([token // max(w, 1), token % max(w, 1)], 1))
                self._tables[key] = torch.cat(views).to(dtype=torch.float32, device=device)
            return self._tables[key].clone()  # the caller may change it

    def view_table(self, window: int, device: torch.device) -> torch.Tensor:
        """Return the kernels' table ``(S + 1, 4)`` for one window side.

        A row holds first token, height, width and first window of a view; the last row the totals.
        """
        if torch.compiler.is_compiling():
            table = torch.ops.uhd_ops._view_table_from_rows(self._rows, window)
            return table if device.type == "cpu" else table.to(device, non_blocking=True)
        key = (window, device)
        if key not in self._tables:
            with _outlives_modes():
                table = torch.ops.uhd_ops._view_table_from_rows(self._rows, window)
                self._tables[key] = table.to(device)
        return self._tables[key]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return self.num_views

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._pairs[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedGrids) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return f"PackedGrids({list(self._pairs)})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"PackedGrids is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"PackedGrids is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[type[PackedGrids], tuple[list[tuple[int, int]]]]:
        return PackedGrids, (list(self._pairs),)


@contextlib.contextmanager
def _outlives_modes() -> Iterator[None]:
    """Make tensors that are kept for later calls independent of the modes of this call.

    A table made under inference mode could not be saved for a backward pass, one made under
    FakeTensorMode would hold no data.
    """
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    with torch.inference_mode(False), _disable_current_modes():
        yield


def is_single_pair(grids: Grids) -> bool:
    """Whether ``grids`` is one bare ``(h, w)`` pair rather than a collection of pairs."""
    return (
        isinstance(grids, (tuple, list))
        and len(grids) == 2
        and all(is_int(_number(side)) for side in grids)
    )


@functools.lru_cache(maxsize=512)
def _cached(pairs: tuple[tuple[int, int], ...]) -> PackedGrids:
    return PackedGrids(pairs)


def _count_windows(pairs: Sequence[Sequence[int]], window: int) -> int:
    return sum(-(-h // window) * -(-w // window) for h, w in pairs)


def pairs_of(grids: Grids) -> tuple[tuple[int, int], ...]:
    """Return ``grids``, in any accepted form, as checked pairs."""
    if isinstance(grids, PackedGrids):
        return grids._pairs
    if is_single_pair(grids):
        grids = (grids,)
    if isinstance(grids, torch.Tensor) and grids.device.type != "cpu":
        raise ValueError(
            f"grids must be on the CPU, got a tensor on {grids.device}: reading it there would "
            "stop the host until the device is idle. Keep the preprocessor's grids as Python "
            "integers."
        )
    if hasattr(grids, "shape") and hasattr(grids, "tolist"):  # tensor or array
        if len(grids.shape) != 2 or grids.shape[1] != 2:
            raise ValueError(f"grids must have shape (S, 2), got {tuple(grids.shape)}")
        grids = grids.tolist()
    if not isinstance(grids, Sequence) or isinstance(grids, (str, bytes)):
        raise TypeError(f"{_EXPECTED}; got {type(grids).__name__}")
    return tuple(_pair(pair) for pair in grids)


def _pair(pair: Sequence[int]) -> tuple[int, int]:
    if hasattr(pair, "shape") and hasattr(pair, "tolist"):  # a row of a tensor or array
        pair = pair.tolist()
    sides = [_number(side) for side in pair] if isinstance(pair, Sequence) else ()
    if len(sides) != 2 or not all(is_int(side) for side in sides):
        raise TypeError(f"{_EXPECTED}; got the entry {pair!r}")
    height, width = (check_int(side, "a side in grids") for side in sides)
    if height < 0 or width < 0:
        raise ValueError(f"grids must not have negative sides, got ({height}, {width})")
    return height, width


def _number(side: object) -> object:
    """The number in a scalar tensor on the CPU, as iterating over a processor's grids gives it."""
    if isinstance(side, torch.Tensor) and side.dim() == 0 and side.device.type == "cpu":
        return side.tolist()
    return side
