# SPDX-License-Identifier: Apache-2.0
"""Attention inside large windows on torch's own kernels.

A window of more than 16 x 16 tokens is long enough for the kernels that torch has for whole
sequences. They take sequences of one length that lie in one piece, so the tokens are gathered
window by window, windows of equal size together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from uhd_ops.grids import PackedGrids, _outlives_modes
from uhd_ops.ops._token_order import Permute
from uhd_ops.ops.view_attention import attend_by_length

# The largest window that our kernels on tensor cores hold.
_LARGEST_OWN = 16


class _Plan(NamedTuple):
    """Where the tokens of grouped windows are. Index tensors ``(N,)`` int64, each with inverse."""

    lengths: list[int]  # tokens of each window, in grouped order
    grouped: tuple[torch.Tensor, torch.Tensor]  # raster -> grouped
    results: dict[str, tuple[torch.Tensor, torch.Tensor]]  # grouped -> each order of results


def suits(q: torch.Tensor, window: int) -> bool:
    """Whether torch's kernels are the ones to use.

    The sides of the views have no say: what is computed for one must not depend on the others.
    """
    halves = (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and q.dtype in halves and window > _LARGEST_OWN


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: PackedGrids,
    window: int,
    scale: float,
    order: str,
) -> torch.Tensor:
    """:func:`uhd_ops.window_attention` of packed tokens ``(N, H, D)``, on any device."""
    plan = _plan(grids, window, q.device)
    q, k, v = (Permute.apply(x, *plan.grouped) for x in (q, k, v))
    return Permute.apply(attend_by_length(q, k, v, plan.lengths, scale), *plan.results[order])


def _plan(grids: PackedGrids, window: int, device: torch.device) -> _Plan:
    key = ("window_major", window, device)
    if key not in grids._tables:
        with _outlives_modes():
            grids._tables[key] = _make_plan(grids, window, device)
    return grids._tables[key]


def _make_plan(grids: PackedGrids, window: int, device: torch.device) -> _Plan:
    window_of_token = _window_of_token(grids, window)
    lengths = window_of_token.bincount(minlength=grids.num_windows(window))
    by_length = lengths.argsort(stable=True)
    place = by_length.argsort()  # of a window among the grouped ones
    # Stable: the tokens of a window keep their raster order.
    grouped = place[window_of_token].argsort(stable=True)
    raster = grouped.argsort()
    window_major = raster[window_of_token.argsort(stable=True)]

    def on_device(index: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return index.to(device), inverse.to(device)

    return _Plan(
        lengths[by_length].tolist(),
        on_device(grouped, raster),
        {
            "raster": on_device(raster, grouped),
            "window": on_device(window_major, window_major.argsort()),
        },
    )


def _window_of_token(grids: PackedGrids, window: int) -> torch.Tensor:
    """Return the number of every token's window, ``(N,)`` int64."""
    parts = [torch.empty(0, dtype=torch.int64, device="cpu")]
    first = 0
    for height, width in grids:
        rows = torch.arange(height, device="cpu") // window
        cols = torch.arange(width, device="cpu") // window
        across = -(-width // window)
        parts.append((first + rows[:, None] * across + cols).flatten())
        first += -(-height // window) * across
    return torch.cat(parts)
