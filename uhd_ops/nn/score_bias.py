# SPDX-License-Identifier: Apache-2.0
"""What hosts with relative positions add to the scores inside a window."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ScoreBias(nn.Module):
    """Base class: a term added to the scaled scores of the tokens in a window.

    Args:
        window: Side f of a window.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Return the bias for queries ``(M, H, f², D)``: ``(..., f², f²)``, broadcast to (M, H)."""
        raise NotImplementedError

    def _by_places(self, table: torch.Tensor, dim: int) -> torch.Tensor:
        """Take ``(..., 2f - 1, ...)`` by offset to ``(..., f, ..., f)`` by query and key.

        No index is needed, which would have to be on the device: the keys are the last dimension.
        """
        return table.unfold(dim, self.window, 1).flip(-1)


class RelativePositionBias(ScoreBias):
    """One number for each head and offset.

    Args:
        table: ``(H, 2f - 1, 2f - 1)``: the bias of query minus key, each offset plus f - 1. Copied.
    """

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__((table.shape[-1] + 1) // 2)
        self.table = nn.Parameter(table.detach().clone())

    @classmethod
    def from_grid(
        cls, bias: torch.Tensor, grid: tuple[int, int], window: int
    ) -> RelativePositionBias:
        """Take the offsets inside a window from what a host adds to the scores of a whole grid.

        Args:
            bias: ``(H, P + h*w, P + h*w)``, queries by keys, prefix tokens first.
            grid: ``(h, w)``. Offsets that it does not have get 0.
            window: Side f of a window.
        """
        height, width = grid
        # On the CPU also while another device is the default: meta tensors cannot be masks.
        offsets = torch.arange(1 - window, window, device="cpu")
        query, key = offsets.clamp(min=0), (-offsets).clamp(min=0)
        query = query[:, None] * width + query
        key = key[:, None] * width + key
        known = (offsets.abs() < height)[:, None] & (offsets.abs() < width)
        patches = bias.detach()[:, -height * width :, -height * width :]
        table = patches.new_zeros((len(bias), *known.shape))
        table[:, known] = patches[:, query[known], key[known]]
        return cls(table)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Return ``(H, f², f²)``."""
        table = self._by_places(self._by_places(self.table, 1), 2)
        return table.flatten(3).flatten(1, 2).to(q.dtype)


class DecomposedPositionBias(ScoreBias):
    """Products of the query with one vector for each vertical and each horizontal offset.

    Args:
        rows: ``(2f - 1, D)``: vectors of the vertical offsets, query minus key plus f - 1. Copied.
        cols: Those of the horizontal offsets.
    """

    def __init__(self, rows: torch.Tensor, cols: torch.Tensor) -> None:
        super().__init__((rows.shape[0] + 1) // 2)
        self.rows = nn.Parameter(rows.detach().clone())
        self.cols = nn.Parameter(cols.detach().clone())

    @classmethod
    def from_grid(
        cls, rows: torch.Tensor, cols: torch.Tensor, window: int
    ) -> DecomposedPositionBias:
        """Take the offsets inside a window from the vectors of a whole grid.

        Args:
            rows: ``(2h - 1, D)``: vectors of the vertical offsets, query minus key plus h - 1.
                Offsets that they do not have get 0.
            cols: Those of the horizontal offsets, ``(2w - 1, D)``.
            window: Side f of a window.
        """
        # A negative pad crops.
        pads = [window - (len(table) + 1) // 2 for table in (rows, cols)]
        tables = (rows, cols)
        rows, cols = (
            functional.pad(table.detach(), (0, 0, pad, pad))
            for table, pad in zip(tables, pads, strict=True)
        )
        return cls(rows, cols)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Return ``(M, H, f², f²)``."""
        rows, cols = (self._by_places(table, 0).mT for table in (self.rows, self.cols))
        vectors = rows[:, None, :, None] + cols[:, None]  # (f, f, f, f, D)
        vectors = vectors.flatten(2, 3).flatten(0, 1)
        return torch.einsum("mhqd,qkd->mhqk", q, vectors.to(q.dtype))
