# SPDX-License-Identifier: Apache-2.0
"""The patch grids of packed views.

Everything is computed from Python integers, once, and kept: no operator ever reads a grid back from
a device.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from uhd_ops import _view_tables
from uhd_ops._cache import Tables, kept, note, outlives_modes, to_device
from uhd_ops._checks import check_device, check_int, is_int

if TYPE_CHECKING:
    import numpy as np

Grids: TypeAlias = (
    "PackedGrids | Sequence[Sequence[int]] | Sequence[int] | torch.Tensor | np.ndarray"
)

_EXPECTED = (
    "grids must be a PackedGrids, a sequence of (h, w) pairs, one (h, w) pair, "
    "or a CPU integer tensor or array of shape (S, 2)"
)
# Window sides whose counts are ready before torch.compile traces, so that one graph serves all
# grids: the products of the sides that two merges have.
_COMMON_WINDOWS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
_CPU = torch.device("cpu")
_COUNTS = ("num_views", "num_tokens", "max_seqlen", "has_empty_views", "_pairs")


class PackedGrids:
    """The grids ``(h, w)`` of the views in one packed sequence, in order. Immutable and hashable.

    Equal grids are one object, which keeps the index tables that operators make for them; see
    :func:`uhd_ops.set_cache_limit`. It is a pytree: torch.export turns it into a tensor of sides,
    so that one exported program takes all grids.

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
    max_seqlen: int
    """Tokens of the largest view; 0 if there is none."""
    has_empty_views: bool
    """Whether a view has no tokens; False where that is not known."""
    is_known = True  # whether the counts can be told without reading a tensor
    is_kept = True  # whether this is the one object for its grids, which keeps their tables

    def __new__(cls, grids: Sequence[Sequence[int]] | torch.Tensor) -> PackedGrids:
        """Return the one object for these grids."""
        return _of_pairs(pairs_of(grids))

    @classmethod
    def of(cls, grids: Grids, batch: int = 1) -> PackedGrids:
        """Return ``grids`` in any accepted form as one object; all views stand ``batch`` times."""
        if isinstance(grids, PackedGrids) and batch == 1:
            if grids.is_kept:
                return grids
            if torch.compiler.is_compiling() or not grids.is_known:
                return TracedGrids.of(grids)
        pairs = pairs_of(grids)
        return _of_pairs(pairs if batch == 1 else pairs * check_int(batch, "batch", 0))

    def num_windows(self, window: int) -> int:
        """Number of windows of side ``window``, the ragged ones included."""
        window = check_int(window, "window", 1)  # 2.0 and True would be found as well
        count = self._counts.get(window)
        return _count_windows(self._pairs, window) if count is None else count

    def merged(self, factor: int = 2) -> PackedGrids:
        """Grids of the merged tokens: ``(ceil(h / factor), ceil(w / factor))`` of each view."""
        factor = check_int(factor, "factor", 1)
        if torch.compiler.is_compiling():
            return TracedGrids.derived(self, "merged", factor)
        key = ("merged", factor)
        return kept(self, key, _CPU, lambda: _of_pairs(_merged_pairs(self._pairs, factor)))

    def sequences(self, prefix: int = 0) -> PackedGrids:
        """Grids ``(1, prefix + h * w)``: each view as a row, with class tokens in front of it."""
        prefix = check_int(prefix, "prefix", 0)
        if torch.compiler.is_compiling():
            return TracedGrids.derived(self, "sequences", prefix)
        key = ("sequences", prefix)
        return kept(self, key, _CPU, lambda: _of_pairs(_sequence_pairs(self._pairs, prefix)))

    @property
    def rows(self) -> torch.Tensor:
        """The sides as a tensor ``(S + 1, 2)`` on the CPU, and a last row to be ignored.

        It is there while torch.compile traces too, where sides are not known as integers.
        """
        return self._rows

    def cu_seqlens(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return where each view starts, ``(S + 1,)`` int32 on ``device``: for varlen attention."""
        with _callers_own():
            return self.view_table(1, torch.device(device))[:, 0].int()

    def coordinates(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return row and column of every token in its view, ``(N, 2)`` float32, in raster order.

        Rotary position embeddings are made from them. For merged tokens, ``window_mean`` of them
        gives the windows' centres, and ``merged(factor).coordinates()`` numbers them anew.
        """
        from uhd_ops.windows import Windows  # which stands on this module

        with _callers_own():
            return Windows.of(self, 1, torch.device(device)).coordinates().clone()

    def view_table(self, window: int, device: torch.device) -> torch.Tensor:
        """Return the kernels' table ``(S + 1, 4)`` for one window side.

        A row holds first token, height, width and first window of a view; the last row the totals.
        """
        if torch.compiler.is_compiling():
            return to_device(_view_tables.table_of_rows(self._rows_for(device), window), device)

        def make() -> torch.Tensor:
            return to_device(_view_tables.table_of_rows(self._rows, window), device)

        return kept(self, ("views", window, device), device, make)

    def to(self, device: torch.device | str) -> PackedGrids:
        """Keep the sides on a device too, for functions that torch.compile has compiled.

        All index tables in a graph are then computed there. Without it they are made on the CPU and
        copied at every call, and torch makes no CUDA graph of what computes on the CPU. Grids that
        are made inside of the graph are there already if they are of one ``(h, w)``. One graph
        serves all grids that have been moved, and another one all that have not.

        Args:
            device: Where the tokens are. Other devices keep what they have.

        Returns:
            These grids, the one object for them. The copy is queued on the current stream, and as
            for any tensor, another stream has to wait for it.

        Raises:
            ValueError: The device is not there.
            NotImplementedError: A CUDA graph is being captured.

        Example:
            >>> compiled = torch.compile(uhd_ops.window_mean)
            >>> grids = PackedGrids([(32, 32), (28, 36)]).to("cpu")  # or "cuda"
        """
        if torch.compiler.is_compiling() or not self.is_kept:
            return self
        device = check_device(device)
        if device.type != "cpu" and device not in self._moved:
            with outlives_modes():
                rows = to_device(self._rows, device)
            rows._dynamo_weak_dynamic_indices = {0}
            self._moved[device] = rows
        return self

    def _rows_for(self, device: torch.device) -> torch.Tensor:
        """The sides for a table on a device: there, if they can be, or on the CPU."""
        return self._moved.get(device, self._rows)

    @property
    def _any_rows(self) -> torch.Tensor:
        """The sides where they are anyway."""
        return next(iter(self._moved.values()), self._rows)

    def __getattr__(self, name: str) -> Any:
        # Counts of what torch.export traces are not there before somebody asks.
        if name in _COUNTS and not self.is_kept:
            return getattr(self._traced, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return self.num_views

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._pairs[index]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, PackedGrids) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return f"PackedGrids([{brief(self._pairs)}])"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"PackedGrids is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"PackedGrids is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[type[PackedGrids], tuple[list[tuple[int, int]]]]:
        return PackedGrids, (list(self._pairs),)


class TracedGrids(PackedGrids):
    """Grids inside a traced function: sides are symbols, or values that only the graph will see.

    They hold either ``sides``, or ``rows`` with the counts that are known of them; nothing is kept.
    """

    is_kept = False
    _is_made = False

    def __new__(cls, *args: object, **kwargs: object) -> TracedGrids:
        """Make a new object each time."""
        return object.__new__(cls)

    def __init__(
        self,
        rows: torch.Tensor | None = None,
        sides: tuple[tuple[int, int], ...] | None = None,
        counts: dict[int, int] | None = None,
        longest: dict[int, int] | None = None,
        source: tuple[PackedGrids, str, int] | None = None,
        less: int = 0,
    ) -> None:
        if self._is_made:  # PackedGrids(pairs) returns one, and Python calls this once more
            return
        self._is_made = True
        self._given_rows, self._sides, self._source = rows, sides, source
        # The counts are so much less than those that are kept here.
        self._counts, self._longest, self._less = counts or {}, longest or {}, less
        self._derived_rows: dict[torch.device, torch.Tensor] = {}
        self.is_known = sides is not None or (source is not None and source[0].is_known)

    @classmethod
    def of(cls, grids: Grids, batch: int = 1) -> TracedGrids:
        """Return grids in a form that takes symbols; ``batch`` must be 1."""
        if isinstance(grids, TracedGrids):
            return grids
        if isinstance(grids, PackedGrids) and not grids.is_kept:
            return grids._traced
        if isinstance(grids, PackedGrids) and torch.compiler.is_compiling():
            return cls.derived(grids, "merged", 1)
        return cls(sides=pairs_of(grids))

    @classmethod
    def derived(cls, grids: PackedGrids, how: str, number: int) -> TracedGrids:
        """What a method called ``how`` makes of grids, in the graph where it can be."""
        if isinstance(grids, TracedGrids) and grids._sides is not None:
            return cls(sides=_DERIVED[how](grids._sides, number))
        less = 0
        if how == "merged":
            # ceil(ceil(h / a) / b) = ceil(h / (a * b))
            if grids.is_kept:
                counts, longest = grids._counts_and_tokens, grids._longest_and_tokens
                less = grids.num_tokens
            else:
                counts, longest, less = grids._counts, grids._longest, grids._less
            counts = {f // number: n for f, n in counts.items() if f % number == 0}
            longest = {f // number: n for f, n in longest.items() if f % number == 0}
        else:
            counts = {1: grids.num_tokens + number * grids.num_views}
            longest = {1: grids.max_seqlen + number * (grids.num_views > 0)}
        return cls(None, None, counts, longest, (grids, how, number), less)

    @property
    def _rows(self) -> torch.Tensor:
        return self._rows_for(_CPU)

    @property
    def _any_rows(self) -> torch.Tensor:
        return self._given_rows if self._source is None else self._source[0]._any_rows

    def _rows_for(self, device: torch.device) -> torch.Tensor:
        if self._given_rows is not None:
            return self._given_rows
        if self._source is None:
            return self.view_table(1, _CPU)[:, 1:3].contiguous()
        if device not in self._derived_rows:
            grids, how, number = self._source
            self._derived_rows[device] = _DERIVED_ROWS[how](grids._rows_for(device), number)
        return self._derived_rows[device]

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        """The sides as integers; a graph made from them is one for these grids alone."""
        if self._sides is not None:
            return self._sides
        rows = self._given_rows
        readable = rows is not None and not isinstance(rows, FakeTensor)
        if readable and not torch.compiler.is_compiling():
            return pairs_of(rows[:-1])
        if self._source is None:
            raise NotImplementedError(
                "the sides of grids are values of a tensor while torch.export traces; this "
                "operation needs them as integers"
            )
        grids, how, number = self._source
        return _DERIVED[how](grids._pairs, number)

    @property
    def num_views(self) -> int:
        """As for PackedGrids."""
        return self._any_rows.shape[0] - 1 if self._sides is None else len(self._sides)

    @property
    def num_tokens(self) -> int:
        """As for PackedGrids."""
        return self.num_windows(1)

    @property
    def max_seqlen(self) -> int:
        """As for PackedGrids."""
        if 1 not in self._longest and self.is_known:
            return max((h * w for h, w in self._pairs), default=0)
        if 1 not in self._longest:
            self._longest[1] = _count_in(self._rows.prod(1).max()) + self._less
        return self._longest[1] - self._less

    @property
    def has_empty_views(self) -> bool:
        """As for PackedGrids."""
        if self._sides is None:
            return self._source is not None and self._source[0].has_empty_views
        return any(0 in pair for pair in self._sides)

    def num_windows(self, window: int) -> int:
        """As for PackedGrids; where the number is not known, it is read in the graph."""
        window = check_int(window, "window", 1)
        if window not in self._counts:
            if self.is_known:
                count = _count_windows(self._pairs, window)
            else:
                count = _count_in(self.view_table(window, _CPU)[-1, 3])
            self._counts[window] = count + self._less
        return self._counts[window] - self._less

    def merged(self, factor: int = 2) -> PackedGrids:
        """As for PackedGrids."""
        return TracedGrids.derived(self, "merged", check_int(factor, "factor", 1))

    def sequences(self, prefix: int = 0) -> PackedGrids:
        """As for PackedGrids."""
        return TracedGrids.derived(self, "sequences", check_int(prefix, "prefix", 0))

    def view_table(self, window: int, device: torch.device, batch: int = 1) -> torch.Tensor:
        """As for PackedGrids; all views stand ``batch`` times."""
        if self._sides is not None:
            if len(self._sides) == 1 and device.type != "cpu":
                return _view_tables.table_of_one(*self._sides[0], batch, window, device)
            table = _view_tables.table_of_sides(self._sides, batch, window)
        else:
            rows = self._rows_for(device)
            if not isinstance(batch, int) or batch != 1:
                rows = torch.cat([rows[:-1].repeat(batch, 1), rows[-1:]])
            table = _view_tables.table_of_rows(rows, window)
        return to_device(table, device)

    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__


def _callers_own() -> contextlib.AbstractContextManager:
    """Make a tensor that the caller may keep for a backward pass, whatever the modes are now."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else outlives_modes()


def brief(values: Sequence[object]) -> str:
    """Return values with commas between them, and of more than eight the first six and the last."""
    if len(values) <= 8:
        return ", ".join(map(str, values))
    return f"{brief(values[:6])}, ... {len(values) - 7} more ..., {values[-1]}"


def is_single_pair(grids: Grids) -> bool:
    """Whether ``grids`` is one bare ``(h, w)`` pair rather than a collection of pairs."""
    if not isinstance(grids, (tuple, list)) or len(grids) != 2:
        return False
    first, second = grids
    if type(first) is type(second) is int:  # what a model computes from an image's size
        return True
    return is_int(_number(first)) and is_int(_number(second))


def pairs_of(grids: Grids) -> tuple[tuple[int, int], ...]:
    """Return ``grids``, in any accepted form, as checked pairs."""
    if isinstance(grids, PackedGrids):
        return grids._pairs
    pair = type(grids) is tuple and len(grids) == 2 and type(grids[0]) is type(grids[1]) is int
    if pair and grids[0] >= 0 and grids[1] >= 0:  # what a model computes from an image's size
        return (grids,)
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
            shape = tuple(grids.shape)
            raise ValueError(f"grids must have shape (S, 2), got {shape}{_of_frames(shape[-1:])}")
        if torch.compiler.is_compiling():
            raise TypeError(
                "grids must be a PackedGrids or (h, w) pairs while tracing, got a tensor, whose "
                "values are unknown then; make a PackedGrids before the traced function"
            )
        grids = grids.tolist()
    if not isinstance(grids, Sequence) or isinstance(grids, (str, bytes)):
        raise TypeError(f"{_EXPECTED}; got {type(grids).__name__}")
    return tuple(_pair(pair) for pair in grids)


def _pair(pair: Sequence[int]) -> tuple[int, int]:
    if hasattr(pair, "shape") and hasattr(pair, "tolist"):  # a row of a tensor or array
        pair = pair.tolist()
    sides = [_number(side) for side in pair] if isinstance(pair, Sequence) else ()
    if len(sides) != 2 or not all(is_int(side) for side in sides):
        raise TypeError(f"{_EXPECTED}; got the entry {pair!r}{_of_frames([len(sides)])}")
    height, width = (check_int(side, "a side in grids") for side in sides)
    if height < 0 or width < 0:
        raise ValueError(f"grids must not have negative sides, got ({height}, {width})")
    return height, width


def _of_frames(columns: Sequence[int]) -> str:
    """What to do with the three columns of a processor of Qwen's."""
    if tuple(columns) != (3,):
        return ""
    return (
        "; if this is Qwen's grid_thw, whose first column counts frames, pass its columns of "
        "height and width, grid_thw[:, 1:], one row for each frame"
    )


def _number(side: object) -> object:
    """The number in a scalar tensor on the CPU, as iterating over a processor's grids gives it."""
    if isinstance(side, torch.Tensor) and side.dim() == 0 and side.device.type == "cpu":
        return side.tolist()
    return side


_known: weakref.WeakValueDictionary[tuple, PackedGrids] = weakref.WeakValueDictionary()
_known_lock = threading.Lock()


def _of_pairs(pairs: tuple[tuple[int, int], ...]) -> PackedGrids:
    """Return the one object for these grids, or one for a trace where sides may be symbols."""
    if torch.compiler.is_compiling():
        return TracedGrids(sides=pairs)
    for pair in pairs:
        if type(pair[0]) is not int or type(pair[1]) is not int:  # a symbol has no hash
            return TracedGrids(sides=pairs)
    found = _known.get(pairs)
    if found is None:
        made = _make(pairs)
        with _known_lock:
            found = _known.setdefault(pairs, made)
        if found is made:
            note(made, 1000 + 400 * len(pairs))
    return found


def _make(pairs: tuple[tuple[int, int], ...]) -> PackedGrids:
    grids = object.__new__(PackedGrids)
    put = functools.partial(object.__setattr__, grids)
    put("_pairs", pairs)
    merged = {f: [-(-h // f) * -(-w // f) for h, w in pairs] for f in _COMMON_WINDOWS}
    put("_counts", {f: sum(tokens) for f, tokens in merged.items()})
    put("_longest", {f: max(tokens, default=0) for f, tokens in merged.items()})
    # torch.compile makes a number a variable once it has changed. With the tokens added, all of
    # them change when the tokens do, and not one by one, with a graph for each.
    for name in ("_counts", "_longest"):
        sums = {f: number + grids._counts[1] for f, number in getattr(grids, name).items()}
        put(f"{name}_and_tokens", sums)
    put("num_views", len(pairs))
    put("num_tokens", grids._counts[1])
    put("max_seqlen", grids._longest[1])
    put("has_empty_views", any(0 in pair for pair in pairs))
    put("_rows", rows_of_views(pairs, (0, 0)))
    put("_moved", {})
    put("_tables", Tables())
    return grids


def rows_of_views(rows: Iterable[tuple[int, int]], last: tuple[int, int]) -> torch.Tensor:
    """Return a row for each view as a tensor ``(S + 1, 2)``, with a last one that holds no view.

    It keeps the length above one: torch.compile specialises on "exactly one view" otherwise.
    """
    with _callers_own():
        table = torch.tensor([*rows, last], dtype=torch.int64, device="cpu")
    if not torch.compiler.is_compiling():
        # As torch._dynamo.maybe_mark_dynamic does, which takes seconds to import.
        table._dynamo_weak_dynamic_indices = {0}
    return table


def _merged_pairs(pairs: Sequence[Sequence[int]], factor: int) -> tuple[tuple[int, int], ...]:
    return tuple((-(-h // factor), -(-w // factor)) for h, w in pairs)


def _sequence_pairs(pairs: Sequence[Sequence[int]], prefix: int) -> tuple[tuple[int, int], ...]:
    return tuple((1, prefix + h * w) for h, w in pairs)


_DERIVED = {"merged": _merged_pairs, "sequences": _sequence_pairs}
_DERIVED_ROWS = {"merged": _view_tables.merged_rows, "sequences": _view_tables.sequence_rows}


def _count_windows(pairs: Sequence[Sequence[int]], window: int) -> int:
    return sum(-(-h // window) * -(-w // window) for h, w in pairs)


def _count_in(number: torch.Tensor) -> int:
    """Read a count in the graph."""
    count = number.item()
    torch._check(count >= 0)
    return count


def _unflatten(leaves: Iterable[Any], context: None) -> PackedGrids:
    (rows,) = leaves
    known = isinstance(rows, torch.Tensor) and not isinstance(rows, FakeTensor)
    if known and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return _of_pairs(pairs_of(rows[:-1]))
    # torch.export wants the type back that it flattened. The rows may be whatever a tree_map made.
    grids, traced = object.__new__(PackedGrids), TracedGrids(rows)
    methods = ("num_windows", "merged", "sequences", "view_table", "cu_seqlens", "coordinates")
    instead = {name: getattr(traced, name) for name in methods}
    vars(grids).update(instead, _rows=rows, _traced=traced, is_known=False, is_kept=False)
    return grids


for _cls in (PackedGrids, TracedGrids):
    pytree.register_pytree_node(
        _cls,
        lambda grids: ([grids._rows], None),
        _unflatten,
        serialized_type_name=f"uhd_ops.{_cls.__name__}",
        to_dumpable_context=lambda context: context,
        from_dumpable_context=lambda context: context,
        flatten_with_keys_fn=lambda grids: ([(pytree.GetAttrKey("rows"), grids._rows)], None),
    )
