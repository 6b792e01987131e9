# SPDX-License-Identifier: Apache-2.0
"""The view tables that kernels read, made of the sides of views: on the CPU, or in a graph.

Sides as a tensor of rows ``(S + 1, 2)`` have a last row that holds no view: torch.compile
specialises on tensors of one row, of which nothing here may make one either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uhd_ops import _native

CPU = torch.device("cpu")


def without_last(rows: torch.Tensor) -> torch.Tensor:
    """Zero the last row; rows above it are not cut off, which could leave one (see above)."""
    count = rows.shape[0]
    return rows * (torch.arange(count, device=rows.device) < count - 1)[:, None]


def merged_rows(rows: torch.Tensor, factor: int) -> torch.Tensor:
    """Rows of ``PackedGrids.merged``."""
    return (rows + (factor - 1)) // factor


def sequence_rows(rows: torch.Tensor, prefix: int) -> torch.Tensor:
    """Rows of ``PackedGrids.sequences``."""
    lengths = without_last(rows.prod(1, keepdim=True) + prefix)[:, 0]
    return torch.stack([torch.ones_like(lengths), lengths], 1)


def table_of_sides(sides: Sequence[Sequence[int]], batch: int, window: int) -> torch.Tensor:
    """The view table of sides that may be symbols."""
    if _native.has_kernels(CPU):
        flat = [side for pair in sides for side in pair]
        return torch.ops.uhd_ops._view_table(flat, batch, window)
    pairs = [(int(height), int(width)) for height, width in sides] * int(batch)
    return table_of_rows(torch.tensor([*pairs, (0, 0)], dtype=torch.int64, device="cpu"), window)


def table_of_one(
    height: int, width: int, batch: int, window: int, device: torch.device
) -> torch.Tensor:
    """The view table of one view that stands ``batch`` times, computed where it is needed."""
    index = torch.arange(batch + 1, device=device)
    held = index < batch
    windows = -(-height // window) * -(-width // window)
    columns = index * (height * width), held * height, held * width, index * windows
    return torch.stack(columns, 1)


def table_of_rows(rows: torch.Tensor, window: int) -> torch.Tensor:
    """The view table of grids ``(S + 1, 2)``, whose last row does not matter; where they are."""
    if rows.device.type == "cpu" and _native.has_kernels(CPU):
        return torch.ops.uhd_ops._view_table_from_rows(rows, window)
    sides = without_last(rows)
    windows = (sides + (window - 1)) // window
    tokens, windows = (counts.prod(1) for counts in (sides, windows))
    first = (counts.cumsum(0) - counts for counts in (tokens, windows))
    first_token, first_window = first
    return torch.stack([first_token, *sides.unbind(1), first_window], 1)


if _native.status["cpu"] == "loaded":

    @torch.library.register_fake("uhd_ops::_view_table")
    def _(sides, repeat, window):
        return torch.empty((len(sides) // 2 * repeat + 1, 4), dtype=torch.int64, device="cpu")

    @torch.library.register_fake("uhd_ops::_view_table_from_rows")
    def _(rows, window):
        return rows.new_empty((rows.shape[0], 4))
