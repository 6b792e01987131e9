# SPDX-License-Identifier: Apache-2.0
"""How a sequence is made up that holds the patches of several images one after the other."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.positions import Rotary, merge_table
from uhd_ops.ops.reorder_tokens import reorder_tokens
from uhd_ops.ops.view_attention import by_group


class PackedLayout:
    """A sequence ``(N, C)``, or a batch ``(1, N, C)`` of one: the patches of several grids.

    It has the methods of :class:`TokenLayout`.

    Args:
        grids: The grids, one for each image or frame.
        order: In which order the patches of a grid lie, by the sides of nested blocks; see
            :func:`uhd_ops.reorder_tokens`. The innermost blocks are those that the model merges
            after its last block: they hold so many merged tokens too. The others stay where they
            are in the image, and hold fewer.
    """

    prefix = 0

    def __init__(self, grids: PackedGrids, order: tuple[int, ...] = ()) -> None:
        self.grids, self.order = grids, order
        self._merged: dict[int, PackedLayout] = {}

    def merged(self, window: int) -> PackedLayout:
        """The layout after the compressor."""
        if window == 1:
            return self
        if window not in self._merged:
            outer = [side // window for side in self.order[:-1]]
            inner = self.order[-1:]
            order = tuple(side for side in outer if side > inner[0]) + inner
            self._merged[window] = PackedLayout(self.grids.merged(window), order)
        return self._merged[window]

    @property
    def places(self) -> tuple[PackedGrids, tuple[int, ...]]:
        """What tells it from other layouts of the same model."""
        return self.grids, self.order

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` has as many tokens."""
        return x.shape[:-1].numel() == x.shape[-2] == self.grids.num_tokens

    def check(self, x: torch.Tensor) -> None:
        """Refuse tokens of another number: something added or dropped some."""
        if not self.holds(x):
            raise ValueError(
                f"x must be (N, C) with the N = {self.grids.num_tokens} tokens of "
                f"{self.grids.num_views} grids, got shape {tuple(x.shape)}"
            )

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the patches, whose ``positions`` are in raster order."""
        merged = compressor(self.raster(x.flatten(0, -2)), self.grids, positions)
        merged = self.merged(compressor.window).ordered(merged)
        return merged if x.dim() == 2 else merged[None]

    def raster(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the rows ``(N, C)`` of each grid into raster order."""
        return reorder_tokens(x, self.grids, order_in=self.order) if self.order else x

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the rows ``(N, C)`` of each grid from raster order into that of the sequence."""
        return reorder_tokens(x, self.grids, self.order) if self.order else x

    def merge_table(
        self, sin: torch.Tensor, cos: torch.Tensor, window: int, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each merged token its sine and cosine; see ``nn.positions.merge_table``.

        Args:
            sin: ``(N, D)``, in the order of the sequence.
            cos: Likewise.
            window: Side of a window, in tokens.
            positions: ``"center"`` or ``"reindex"``.
        """
        grids = list(self.grids)

        def merge(views: list[torch.Tensor], first: int) -> torch.Tensor:
            tables = views[0].chunk(2, -1)
            return torch.cat(merge_table(*tables, grids[first], window, positions), -1)

        lengths = [height * width for height, width in grids]
        merged = by_group(merge, (self.raster(torch.cat([sin, cos], -1)),), lengths, grids)
        return self.merged(window).ordered(merged).chunk(2, -1)
