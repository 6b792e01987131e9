# SPDX-License-Identifier: Apache-2.0
"""Where tokens, views, windows and their slots are, and in which order the tokens lie.

All index tables are made here, by arithmetic on the kernels' view table, where that is: nothing is
read back from a device, and torch.compile makes one graph for all grids. Those of PackedGrids are
made once for a device and kept; see :func:`uhd_ops.set_cache_limit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor

from uhd_ops import _native, _sharding
from uhd_ops._cache import clock, kept, to_device
from uhd_ops._checks import LARGEST_INT, check_positive_int, check_tensor
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids, PackedGrids, TracedGrids, is_single_pair
from uhd_ops.padded_grids import PaddedGrids

TokenOrder: TypeAlias = Literal["raster", "block", "window"] | Sequence[int]

_NAMED = {"raster": (), "block": (2,)}


class Windows:
    """The tokens of one call, packed view by view, and their windows of one side.

    Tables with an entry per token or window are int32 where that is enough.

    Attributes:
        views: The kernels' view table ``(S + 1, 4)`` on the device of the tokens: first token,
            height, width and first window of each view; the last row holds the totals.
        window: Side f of a window.
        num_tokens: Tokens N, of all views, or of each view of a batch.
        num_windows: Windows, likewise.
        all_tokens: Tokens of the whole call, N.
        all_windows: Windows of the whole call, M.
        batch: None for packed tokens ``(N, ...)``, B for batched ones ``(B, h*w, ...)``.
        grids: The grids of all views; None where they are padded, so that the numbers are
            capacities.
    """

    __slots__ = (
        *("all_tokens", "all_windows", "batch", "grids", "num_tokens", "num_windows"),
        *("views", "window"),
    )

    def __init__(
        self,
        views: torch.Tensor,
        window: int,
        num_tokens: int,
        num_windows: int,
        batch: int | None = None,
        grids: PackedGrids | None = None,
    ) -> None:
        self.views, self.window, self.batch, self.grids = views, window, batch, grids
        self.num_tokens, self.num_windows = num_tokens, num_windows
        times = 1 if batch is None else batch
        self.all_tokens, self.all_windows = num_tokens * times, num_windows * times

    @classmethod
    def of(
        cls, grids: PackedGrids, window: int, device: torch.device, batch: int | None = None
    ) -> Windows:
        """Return the windows of grids; with ``batch``, of one grid that stands so many times."""
        if not grids.is_kept or torch.compiler.is_compiling():
            return cls._made(grids, window, device, batch)
        key, tables = ("windows", window, device, batch), grids._tables
        if type(found := tables.get(key)) is Windows:  # on CUDA, streams may have to wait
            tables.used = next(clock)
            return found
        return kept(grids, key, device, lambda: cls._made(grids, window, device, batch))

    @classmethod
    def _made(
        cls, grids: PackedGrids, window: int, device: torch.device, batch: int | None
    ) -> Windows:
        if batch is None:
            every, views = grids, grids.view_table(window, device)
        elif isinstance(grids, TracedGrids) or torch.compiler.is_compiling():
            every, views = grids, TracedGrids.of(grids).view_table(window, device, batch)
        else:
            every = PackedGrids.of(grids, batch)
            views = every.view_table(window, device)
        return cls(views, window, grids.num_tokens, grids.num_windows(window), batch, every)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.views.device

    @property
    def keeps(self) -> bool:
        """Whether tables are kept: not for padded grids, which change, and not while tracing."""
        kept = self.grids is not None and self.grids.is_kept
        return kept and not torch.compiler.is_compiling()

    def direct(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int] | None:
        """What follows tokens in a call of a native operator: the table, the side, the windows.

        None where ``x`` must be packed for the operator, or has none.
        """
        if self.batch is not None or not _native.has_kernels(x.device):
            return None
        return self.views, self.window, self.all_windows

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, h*w, ...)`` to ``(N, ...)``; packed tokens as they are."""
        return x if self.batch is None else x.reshape(self.all_tokens, *x.shape[2:])

    def pack_windows(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, M / B, ...)`` to ``(M, ...)``; packed results as they are."""
        return x if self.batch is None else x.reshape(self.all_windows, *x.shape[2:])

    def unpack_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, ...)`` to ``(B, h*w, ...)`` where the input was batched."""
        return x if self.batch is None else x.reshape(self.batch, self.num_tokens, *x.shape[1:])

    def unpack_windows(self, x: torch.Tensor) -> torch.Tensor:
        """``(M, ...)`` to ``(B, M / B, ...)`` where the input was batched."""
        return x if self.batch is None else x.reshape(self.batch, self.num_windows, *x.shape[1:])

    def zero_padding(self, x: torch.Tensor) -> torch.Tensor:
        """``(M, ...)`` with zeros in the rows beyond the windows that there are."""
        if self.grids is not None:
            return x
        beyond = torch.arange(self.num_windows, device=x.device) >= self.views[-1, 3]
        return x.masked_fill(beyond.view(-1, *(1,) * (x.dim() - 1)), 0)

    # ------------------------------------------------------------------------------ index tables

    def view_of_token(self) -> torch.Tensor:
        """Return the number of every token's view, ``(N,)``."""
        return self._kept("view_of_token", lambda: self._narrow(self._row_of(0, self._tokens())))

    def coordinates(self) -> torch.Tensor:
        """Return row and column of every token in its view, ``(N, 2)`` float32."""
        return self._kept("coordinates", lambda: torch.stack(self._places()[:2], 1).float())

    def nearest(self, rows: int, cols: int) -> torch.Tensor:
        """Return the place in a table ``(rows, cols)`` that is nearest below every token's, (N,).

        A token in row i of n takes row ``floor(i * rows / n)``.
        """

        def make() -> torch.Tensor:
            row, col, _, height, width, _ = self._places()
            return self._narrow(row * rows // height * cols + col * cols // width)

        return self._kept(("nearest", rows, cols), make)

    def window_of_token(self) -> torch.Tensor:
        """Return the number of every token's window, ``(N,)``; padding is in window 0."""
        return self._kept("window_of_token", self._window_of_token)

    def sizes(self) -> torch.Tensor:
        """Return the number of tokens of every window, ``(M,)``."""
        return self._kept("sizes", self._sizes)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """List the tokens of every window.

        Returns:
            Two tensors of shape ``(M, f*f)``, slots in raster order inside the window: the packed
            index of the token in the slot, or of the nearest present token where a ragged window
            has none; and whether the slot has a token of its own, bool.
        """
        return self._kept("slots", self._slots)

    def slot_of_token(self) -> torch.Tensor:
        """Where :meth:`slots` has each token, ``(N,)``: its slot, as if they were one row."""
        return self._kept("slot_of_token", self._slot_of_token)

    def by_shape(self) -> tuple[dict[tuple[int, int], torch.Tensor], torch.Tensor]:
        """List the tokens of every window, those of one shape together.

        Returns:
            For each shape ``(height, width)`` of a window that occurs: packed indices of its
            tokens, ``(n, height * width)``, in raster order inside the window. And where each token
            is in all of these one after the other, ``(N,)``.
        """
        return self._kept("by_shape", self._by_shape)

    def permutation(
        self, order_in: tuple[int, ...], order: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row that goes to each row when tokens change order, ``(N,)``; the inverse."""
        name = "permutation", order_in, order

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            (place_in, token_in), (place, token) = self._ordered(order_in), self._ordered(order)
            return self._narrow(place_in[token]), self._narrow(place[token_in])

        return self._kept(name, make)

    def with_prefix(self, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the rows of sequences in which ``prefix`` tokens stand in front of each view.

        Returns:
            The row of each of them among all prefix tokens, view by view, followed by all tokens;
            and the inverse, each ``(S * prefix + N,)``.
        """
        return self._kept(("with_prefix", prefix), lambda: self._with_prefix(prefix))

    def by_length(self) -> tuple[Any, ...]:
        """Find the tokens window by window, windows with equally many tokens together.

        Returns:
            The tokens of each window in that order; and three pairs of an index ``(N,)`` and its
            inverse: from raster order to that one, from that one to raster order, and from that one
            to window-major order.
        """
        return self._kept("by_length", self._by_length)

    def window_major(self) -> Windows:
        """Return the same windows for tokens that lie window by window, whatever their order there.

        A run of n full windows is one view of ``(n * f, f)`` tokens: its windows follow each other.
        A ragged window is a view of its own, and so is every window where nothing can be kept: the
        table's size must not depend on the grids' values there.
        """
        if self.keeps:
            runs = self._kept("window_major", lambda: PackedGrids(_runs(self.grids, self.window)))
            views = runs.view_table(self.window, self.device)
        else:
            place, rows, cols, _, _ = self._extents(1)
            index = torch.arange(self.all_windows + 1, device=self.device)
            views = torch.stack([place, rows, cols, index.minimum(self.views[-1, 3])], 1)
        counts = self.num_tokens, self.num_windows
        return Windows(views, self.window, *counts, self.batch, self.grids)

    def _kept(self, name: Any, make: Callable[[], Any]) -> Any:
        if not self.keeps:
            return make()
        return kept(self.grids, (name, self.window, self.device), self.device, make)

    def _narrow(self, index: torch.Tensor) -> torch.Tensor:
        """Halve the memory of what is kept."""
        narrow = self.keeps and self.all_tokens * self.window**2 <= LARGEST_INT
        return index.int() if narrow else index

    def _row_of(self, column: int, index: torch.Tensor) -> torch.Tensor:
        """Return the row of the view table for tokens (column 0) or windows (column 3)."""
        # The whole column, the totals included: torch.compile specialises on tensors of one row.
        return torch.searchsorted(self.views[:, column].contiguous(), index, right=True) - 1

    def _tokens(self) -> torch.Tensor:
        return torch.arange(self.all_tokens, device=self.device)

    def _places(self) -> tuple[torch.Tensor, ...]:
        """Return row and column of every token in its view, and what its view is."""
        token = self._tokens()
        first, height, width, first_window = self.views[self._row_of(0, token)].unbind(1)
        columns = width.clamp(min=1)  # no division by zero in the padding
        row, col = (token - first) // columns, (token - first) % columns
        return row, col, first, height, width, first_window

    def _extents(self, more: int = 0) -> tuple[torch.Tensor, ...]:
        """Return what every window is, and the ``more`` after the last one, which hold nothing.

        Returns:
            Its first token if tokens lay window by window, its rows and columns, its first token in
            raster order, and the width of its view.
        """
        index = torch.arange(self.all_windows + more, device=self.device)
        first, height, width, first_window = self.views[self._row_of(3, index)].unbind(1)
        across = ((width + self.window - 1) // self.window).clamp(min=1)
        top = (index - first_window) // across * self.window
        left = (index - first_window) % across * self.window
        rows = (height - top).clamp(0, self.window)
        cols = (width - left).clamp(0, self.window)
        above = first + top * width
        return above + left * rows, rows, cols, above + left, width

    def _window_of_token(self) -> torch.Tensor:
        row, col, _, _, width, first_window = self._places()
        across = (width + self.window - 1) // self.window
        index = first_window + row // self.window * across + col // self.window
        # What is made of padding does not count.
        return self._narrow(torch.where(self._tokens() < self.views[-1, 0], index, 0))

    def _sizes(self) -> torch.Tensor:
        _, rows, cols, _, _ = self._extents()
        return self._narrow(rows * cols)

    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        _, rows, cols, corner, width = (table[:, None] for table in self._extents())
        slot = torch.arange(self.window**2, device=self.device)
        row, col = slot // self.window, slot % self.window
        token = corner + row.minimum(rows - 1) * width + col.minimum(cols - 1)
        return self._narrow(token), (row < rows) & (col < cols)

    def _slot_of_token(self) -> torch.Tensor:
        row, col = self._places()[:2]
        of_window = row % self.window * self.window + col % self.window
        return self._narrow(self.window_of_token().long() * self.window**2 + of_window)

    def _by_shape(self) -> tuple[dict[tuple[int, int], torch.Tensor], torch.Tensor]:
        counts: dict[tuple[int, int], int] = {}
        for height, width in self.grids:
            for tall, down in _strips(int(height), self.window):
                for wide, across in _strips(int(width), self.window):
                    counts[tall, wide] = counts.get((tall, wide), 0) + down * across
        shapes = sorted(counts)
        _, rows, cols, corner, width = self._extents()
        order = (rows * (self.window + 1) + cols).argsort(stable=True)
        parts = order.split([counts[shape] for shape in shapes])
        found = {}
        for (tall, wide), part in zip(shapes, parts, strict=True):
            token = torch.arange(tall, device=self.device)[:, None] * width[part, None, None]
            token = corner[part, None, None] + token + torch.arange(wide, device=self.device)
            found[tall, wide] = self._narrow(token.flatten(1))
        listed = torch.cat([self._tokens()[:0], *(token.flatten() for token in found.values())])
        return found, self._narrow(listed.argsort())

    def _by_length(self) -> tuple:
        # Their lengths are wanted as integers, so all is made on the CPU.
        here = Windows.of(self.grids, self.window, torch.device("cpu"))
        window_of_token, sizes = here.window_of_token().long(), here.sizes()
        by_length = sizes.argsort(stable=True)
        # Stable: the tokens of a window keep their raster order.
        grouped = by_length.argsort()[window_of_token].argsort(stable=True)
        raster = grouped.argsort()
        window_major = raster[window_of_token.argsort(stable=True)]
        pairs = (grouped, raster), (raster, grouped), (window_major, window_major.argsort())
        moved = (tuple(to_device(self._narrow(i), self.device) for i in pair) for pair in pairs)
        return sizes[by_length].tolist(), *moved

    def _ordered(self, order: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the place of every token, counted in raster order; the token of every place."""
        token = self._tokens()
        if not order:
            return token, token
        row, col, first, height, width, _ = self._places()
        place = first + _place_in_view(row, col, height, width, order)
        place = torch.where(token < self.views[-1, 0], place, token)  # padding stays where it is
        return place, torch.zeros_like(place).index_copy(0, place, token)

    def _with_prefix(self, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        view = torch.arange(self.views.shape[0] - 1, device=self.device)
        in_front = (self.views[:-1, 0] + view * prefix)[:, None]
        in_front = in_front + torch.arange(prefix, device=self.device)
        token = self._tokens()
        inverse = torch.cat([in_front.flatten(), token + (self._row_of(0, token) + 1) * prefix])
        rows = torch.arange(inverse.shape[0], device=self.device)
        index = torch.zeros_like(inverse).index_copy(0, inverse, rows)
        return self._narrow(index), self._narrow(inverse)


def _strips(side: int, window: int) -> list[tuple[int, int]]:
    """The windows' sides along a side of a view, and how many windows have each."""
    strips = (window, side // window), (side % window, 1)
    return [(length, count) for length, count in strips if length and count]


def _runs(grids: PackedGrids, window: int) -> list[tuple[int, int]]:
    """Return the fewest views whose windows are those of ``grids``, one behind the other."""
    runs = [(0, window)]

    def add(height: int, width: int) -> None:
        before = runs[-1]
        if before[1] == width == window and before[0] % window == 0:
            runs[-1] = (before[0] + height, window)
        else:
            runs.append((height, width))

    for height, width in grids:
        for top in range(0, height if width else 0, window):
            rows = min(window, height - top)
            if rows == window:
                add(width // window * window, window)
            else:
                for _ in range(width // window):
                    add(rows, window)
            if width % window:
                add(rows, width % window)
    return runs


def _place_in_view(
    row: torch.Tensor,
    col: torch.Tensor,
    height: torch.Tensor,
    width: torch.Tensor,
    order: tuple[int, ...],
) -> torch.Tensor:
    """Return the places of the tokens at (row, col) among those of a view or block."""
    if not order:
        return row * width + col
    side = order[0]
    top, left = row // side * side, col // side * side
    rows, cols = (height - top).clamp(max=side), (width - left).clamp(max=side)
    # The rows of blocks above, the blocks to the left, and then the order within the block.
    return top * width + left * rows + _place_in_view(row - top, col - left, rows, cols, order[1:])


# ------------------------------------------------------------------------- the tokens of one call


def locate(
    x: torch.Tensor, name: str, grids: Grids, window: int, trailing: tuple[str, ...]
) -> Windows:
    """Match tokens ``x`` against ``grids``.

    Args:
        x: ``(N, *trailing)``, or ``(B, h*w, *trailing)`` with one pair or PackedGrids of one view.
        name: What the caller calls ``x``, for messages.
        grids: Grids in any accepted form.
        window: Window side, checked before.
        trailing: Names of the dimensions after the tokens, such as ``("C",)``.

    Raises:
        TypeError: ``grids`` has no accepted form.
        ValueError: The number of tokens or dimensions does not fit.
    """
    more = x.dim() - len(trailing)
    if more != 1 and more != 2:
        shape = ", ".join(trailing)
        raise ValueError(
            f"{name} must be (N, {shape}), or (B, h*w, {shape}) with one (h, w) grid, "
            f"got shape {tuple(x.shape)}"
        )
    batch = x.shape[0] if more == 2 else None
    if batch is not None and not isinstance(grids, PackedGrids) and not is_single_pair(grids):
        raise _several_grids(x, name, trailing)
    if isinstance(grids, PaddedGrids):
        return _padded_windows(x, name, grids, window, trailing)
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        grids = TracedGrids.of(grids)
    elif type(grids) is not PackedGrids or not grids.is_kept:
        grids = PackedGrids.of(grids)
    if batch is not None and grids.num_views != 1:
        raise _several_grids(x, name, trailing)
    where = Windows.of(grids, window, x.device, batch)
    tokens = x.shape[more - 1]
    if not grids.is_known:
        torch._check(tokens == where.num_tokens)  # in the graph
    elif tokens != where.num_tokens:
        shape = ", ".join(trailing)
        form = f"(N, {shape}) with N" if batch is None else f"(B, h*w, {shape}) with h*w"
        raise ValueError(
            f"{name} must be {form} = {where.num_tokens} tokens (sum of h*w over grids), "
            f"got shape {tuple(x.shape)}"
        )
    return where


def parsed(grids: Grids, x: torch.Tensor) -> Grids:
    """Return the grids of ``x`` as an object, for several calls with the same ones.

    A list of grids for batched tokens stays a list, which :func:`check_tokens` refuses: once it is
    an object, a list of one pair is as good as a pair.
    """
    if isinstance(grids, (PackedGrids, PaddedGrids)):
        return grids
    batched = isinstance(x, torch.Tensor) and x.dim() == 3
    return grids if batched and not is_single_pair(grids) else PackedGrids.of(grids)


def _several_grids(x: torch.Tensor, name: str, trailing: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"{name} of shape {tuple(x.shape)} is batched, so grids must be one (h, w) pair; "
        f"pack the views into (N, {', '.join(trailing)}) for several grids"
    )


def _padded_windows(
    x: torch.Tensor, name: str, grids: PaddedGrids, window: int, trailing: tuple[str, ...]
) -> Windows:
    if not _native.has_kernels(x.device):
        raise NotImplementedError(
            f"grids: PaddedGrids need the native kernels, which are not loaded for {x.device}; "
            "see uhd_ops.build_info()"
        )
    views = grids.view_table(window, x.device)
    if x.shape[0] != grids.num_tokens:
        raise ValueError(
            f"{name} must be (N, {', '.join(trailing)}) with N = {grids.num_tokens} tokens "
            f"(max_tokens of the PaddedGrids), got shape {tuple(x.shape)}"
        )
    return Windows(views, window, grids.num_tokens, grids.num_windows(window))


def check_tokens(x: object, grids: Grids, window: int, channels: int) -> Windows:
    """``x`` holds the tokens of ``grids`` with so many channels; returns where they are."""
    return _check_tokens((x,), grids, (window, channels))[0]


@checked_once
def _check_tokens(x, grids, window, channels) -> Checked:
    check_tensor(x, "x")
    where = locate(x, "x", grids, window, ("C",))
    if x.shape[-1] != channels:
        raise ValueError(f"x must have C = {channels} channels, got shape {tuple(x.shape)}")
    return where, None


# -------------------------------------------------------------------------------- moving tokens


def check_order(order: object, name: str, window: int | None = None) -> tuple[int, ...]:
    """Return the sides of nested blocks, from the outermost to the innermost.

    ``()`` is raster order, ``(2,)`` is 2 x 2-block-major, ``(8, 2)`` puts the 8 x 8 blocks of a
    view one after the other and orders each of them by 2 x 2 blocks. Blocks at the right and bottom
    edge may hold fewer tokens. ``"window"`` means ``(window,)`` if there is a window.
    """
    if isinstance(order, str) and order == "raster":
        return ()
    named = _NAMED if window is None else {**_NAMED, "window": (window,)}
    if not isinstance(order, (str, tuple, list)) or (isinstance(order, str) and order not in named):
        names = ", ".join(f'"{known}"' for known in named)
        error = ValueError if isinstance(order, str) else TypeError
        got = repr(order) if isinstance(order, str) else type(order).__name__
        raise error(f"{name} must be {names} or sides of nested blocks such as (8, 2), got {got}")
    sides = named[order] if isinstance(order, str) else order
    sides = tuple(check_positive_int(side, f"every side in {name}") for side in sides)
    if any(inner >= outer for outer, inner in pairwise(sides)):
        raise ValueError(
            f"{name} must name blocks from the outermost to the innermost, each smaller than the "
            f"one around it, got {sides}"
        )
    return sides[:-1] if sides[-1:] == (1,) else sides  # blocks of one token order nothing


class Permute(torch.autograd.Function):
    """Rows in another order. The gradient is gathered too, where indexing would scatter it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, index, inverse):
        """Return ``x`` with row ``index[i]`` in place i."""
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the indices."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        """Return the rows to where they came from."""
        index, inverse = ctx.saved_tensors
        return Permute.apply(grad, inverse, index), None, None


def reorder(
    x: torch.Tensor, where: Windows, order_in: tuple[int, ...], order: tuple[int, ...]
) -> torch.Tensor:
    """Return packed ``x (N, ...)`` in another order, in new memory."""
    return Permute.apply(x, *_sharding.beside(x, *where.permutation(order_in, order)))


def arrange(
    x: torch.Tensor, where: Windows, order_in: tuple[int, ...]
) -> tuple[torch.Tensor, Windows]:
    """Return packed tokens, and windows that find them there, for kernels that expect raster order.

    The tokens move only if they do not lie window by window already.
    """
    if not order_in:
        return x, where
    if order_in == (where.window,):
        return x, where.window_major()
    return reorder(x, where, order_in, ()), where


def join_prefix(prefix: torch.Tensor, patches: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
    """Put each view's prefix tokens ``(S, P, C)`` in front of its patches ``(N, C)``, packed.

    The result ``(S * P + N, C)`` lies on ``grids.sequences(P)``; :func:`split_prefix` undoes it.
    """
    if prefix.shape[1] == 0:
        return patches
    both = torch.cat([prefix.flatten(0, 1), patches])
    where = Windows.of(grids, 1, patches.device)
    return Permute.apply(both, *where.with_prefix(prefix.shape[1]))


def split_prefix(
    x: torch.Tensor, grids: PackedGrids, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`join_prefix`: the prefix tokens ``(S, P, C)`` and the patches ``(N, C)``."""
    if prefix == 0:
        return x.new_empty((grids.num_views, 0, x.shape[1])), x
    index, inverse = Windows.of(grids, 1, x.device).with_prefix(prefix)
    both = Permute.apply(x, inverse, index)
    in_front = grids.num_views * prefix
    tokens = both.shape[0] - in_front
    first, patches = both.split([in_front, tokens])
    return first.unflatten(0, (grids.num_views, prefix)), patches
