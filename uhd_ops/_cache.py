# SPDX-License-Identifier: Apache-2.0
"""What is kept for later calls with the same grids, within a number of bytes, and how it moves.

Equal grids are one object, which holds the index tables that calls made for it. The grids used
longest ago lose theirs when all tables together exceed the limit. Nothing that is made on the host
waits for the device that it goes to: :func:`to_device`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from uhd_ops._checks import check_int

_DEFAULT_LIMIT = 256 * 2**20
_OBJECT = 500  # bytes, about, of a small Python object that holds a tensor

_lock = threading.RLock()
_limit = _DEFAULT_LIMIT
_held = 0  # bytes
_owners: dict[int, Any] = {}  # by id
clock = itertools.count()
# CUDA graphs read the tables of these grids at every replay, and nobody tells when the last one is.
_captured: dict[int, Any] = {}


class Tables(dict):
    """The tables of one object, by key; how many bytes they have, and when one was used last.

    Some of them are in ``last`` too, where who needs one most often finds it first.
    """

    __slots__ = ("bytes", "last", "used")

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.used = 0, next(clock)
        self.last: dict[Hashable, Any] = {}

    def clear(self) -> None:
        """Forget all tables."""
        super().clear()
        self.last.clear()


class _OnStream(NamedTuple):
    """Tables on a CUDA device: the stream that their making was queued on, and when it is done."""

    value: Any
    stream: torch.cuda.Stream
    done: torch.cuda.Event


def clear_caches() -> int:
    """Forget the grids and index tables that are kept for later calls, which make them again.

    Tables that a CUDA graph was captured with stay: it reads them whenever it is replayed.

    Returns:
        About how many bytes were freed.
    """
    with _lock:
        kept = _held
        _shrink(0)
        return kept - _held


def set_cache_limit(max_bytes: int) -> int:
    """Limit the memory of grids and index tables that are kept for later calls, on all devices.

    The grids used longest ago lose their tables first. A call that uses one at that moment is not
    disturbed. Tables that a CUDA graph was captured with are kept whatever the limit. The default
    is 256 MiB; an index table takes 4 bytes per token.

    Args:
        max_bytes: The limit; 0 keeps nothing.

    Returns:
        The previous limit.

    Raises:
        TypeError: ``max_bytes`` is not an int.
        ValueError: It is negative.

    Example:
        >>> before = set_cache_limit(64 * 2**20)
        >>> set_cache_limit(before) == 64 * 2**20
        True
    """
    global _limit
    max_bytes = check_int(max_bytes, "max_bytes", 0)
    with _lock:
        before, _limit = _limit, max_bytes
        _shrink(_limit)
        return before


def kept(owner: Any, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
    """Return what ``make()`` returned when it was last called with this key.

    Args:
        owner: Whose ``_tables`` to look in; kept alive with them.
        key: What tells its tables apart.
        device: Of the tensors that ``make`` returns.
        make: Makes tensors, on their own, in tuples or dictionaries, or an object that holds one.
    """
    tables = owner._tables
    found = tables.get(key)
    if found is not None:
        tables.used = next(clock)
        return found if device.type != "cuda" else _on_current_stream(owner, found)
    on_cuda = device.type == "cuda"
    if on_cuda and torch.cuda.is_current_stream_capturing():
        return make()  # in the memory of the graph, and of no value before its first replay
    with outlives_modes():
        value = found = make()
        if on_cuda:
            stream = torch.cuda.current_stream(device)
            found = _OnStream(value, stream, stream.record_event())
    with _lock:
        if key not in tables:  # another thread may have been faster
            tables[key] = found
            note(owner, _size(value))
    return value


def note(owner: Any, size: int) -> None:
    """Count so many bytes more for ``owner``."""
    global _held
    with _lock:
        if id(owner) in _captured:
            return
        owner._tables.bytes += size
        owner._tables.used = next(clock)
        _held += size
        _owners[id(owner)] = owner
        if _held > _limit:
            # Some more than must be, so that not every new table sorts the owners again.
            _shrink(_limit * 7 // 8)


def _shrink(limit: int) -> None:
    for owner in sorted(_owners.values(), key=lambda owner: owner._tables.used):
        if _held <= limit:
            break
        _release(owner)
        owner._tables.clear()


def _release(owner: Any) -> None:
    global _held
    if _owners.pop(id(owner), None) is not None:
        _held -= owner._tables.bytes
        owner._tables.bytes = 0


def _on_current_stream(owner: Any, found: _OnStream) -> Any:
    """Return the tables; work queued on the current stream may read them."""
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            _captured[id(owner)] = owner
            _release(owner)
        return found.value
    stream = torch.cuda.current_stream(found.stream.device)
    if stream != found.stream:
        stream.wait_event(found.done)
        for tensor in _tensors(found.value):
            tensor.record_stream(stream)
    return found.value


def to_device(table: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move what was made on the host to a device, without waiting for what is queued there.

    Args:
        table: A tensor on the CPU, of the dtype that is wanted: CUDA converts in memory that it
            would wait for.
        device: Where it is needed.

    Raises:
        NotImplementedError: A CUDA graph is being captured.
    """
    return staged(table, device).to(device, non_blocking=True)


def staged(table: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a table of the host where a CUDA device copies from on its own; see to_device.

    torch gives such memory away again when the copy is done, on whatever stream that was queued.
    """
    if torch.device(device).type != "cuda" or table.device.type != "cpu":
        return table
    if torch.compiler.is_compiling() or isinstance(table, FakeTensor):
        return table
    if torch.cuda.is_current_stream_capturing():
        # Every replay would copy from memory that others have got since.
        raise NotImplementedError(
            "a CUDA graph is being captured, and what this call makes of its grids is not on "
            f"{device} yet: make the same call once before capturing, with uhd_ops.set_cache_limit "
            "high enough to keep it; PaddedGrids.update must be outside of the graph"
        )
    return table.pin_memory()


def _size(value: Any) -> int:
    return _OBJECT + sum(tensor.nbytes + _OBJECT for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "views"):
        yield from _tensors(value.views)


@contextlib.contextmanager
def outlives_modes() -> Iterator[None]:
    """Make tensors that are kept for later calls independent of the modes of this call.

    A table made under inference mode could not be saved for a backward pass, one made under
    FakeTensorMode would hold no data.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield
