# SPDX-License-Identifier: Apache-2.0
"""Relative positions of merged tokens, derived from those that a host has for its fine grid.

Two merged tokens get what the host adds to the scores of two of its own tokens: the first ones of
their windows, which lie ``window`` times as far apart (``positions="center"``), or those with the
indices of the merged tokens (``"reindex"``). Tables keep their size and their names, so checkpoints
load, they stay trainable, and what resizes them still can.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._cache import kept, to_device
from uhd_ops.grids import PackedGrids
from uhd_ops.nn import modules
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import CoarseBlock, TokenLayout
from uhd_ops.retrofit.packed import Grid, PackedModel, Sides


class StandIn:
    """A module with other values for some attributes, to call a method of its class on.

    The module itself does not change, so other threads and later calls do not see them.

    Args:
        module: Has all the other attributes.
        attributes: The other values.
    """

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        self.module = module
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def stride_of(window: int, positions: str) -> int:
    """Fine tokens between the positions of two merged neighbours."""
    return window if positions == "center" else 1


def tokens_of_merged(
    layout: TokenLayout, window: int, positions: str, device: torch.device
) -> torch.Tensor:
    """For each prefix and merged token, the fine token whose relative positions it gets."""
    stride, merged = stride_of(window, positions), layout.merged(window)
    rows = torch.arange(merged.height, device=device) * stride
    cols = torch.arange(merged.width, device=device) * stride
    patches = (rows[:, None] * layout.width + cols).flatten() + layout.prefix
    return torch.cat([torch.arange(layout.prefix, device=device), patches])


def merge_bias(
    bias: torch.Tensor, layout: TokenLayout, window: int, positions: str
) -> torch.Tensor:
    """Give merged tokens their relative positions.

    Args:
        bias: ``(..., P + h*w, P + h*w)``: one value for each query and each key, or the index of
            one.
        layout: What the sequence is made up of.
        window: Side of a window, in tokens.
        positions: ``"center"`` or ``"reindex"``.

    Returns:
        Those of prefix and merged tokens, queries by keys.
    """
    tokens = tokens_of_merged(layout, window, positions, bias.device)
    return bias[..., tokens[:, None], tokens]


def relative_index(
    grid: Grid, window: int, positions: str, prefix: int, device: torch.device
) -> torch.Tensor:
    """Index of the offset between each two tokens in a host's table, as timm numbers them.

    Args:
        grid: Patches ``(h, w)`` of the view.
        window: Side of the windows that became one token, in patches; 1 for patches.
        positions: ``"center"`` or ``"reindex"``.
        prefix: 1 with a class token, whose three entries follow those of the offsets; or 0.
        device: Where the index is needed.

    Returns:
        ``(P + m, P + m)``, queries by keys.
    """
    stride = stride_of(window, positions)
    places = [torch.arange(0, -(-side // window), device=device) * stride for side in grid]
    rows, cols = (axis.flatten() for axis in torch.meshgrid(*places, indexing="ij"))
    spans = [2 * side - 1 for side in grid]
    down, right = rows[:, None] - rows + grid[0] - 1, cols[:, None] - cols + grid[1] - 1
    index = down * spans[1] + right
    if prefix:
        index = functional.pad(index, (1, 0, 1, 0))
        offsets = spans[0] * spans[1]
        index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def resize_table(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Resize a table of offsets as timm's ``set_window_size`` does, where it is; differentiable.

    timm goes through the CPU, head by head. The arithmetic is the same, so are the values: each of
    the new offsets is a mixture of the four around it. Which those are is kept with the grid.

    Args:
        table: ``(offsets + extra, heads)``: the offsets ``(2h - 1) * (2w - 1)`` of the old grid in
            raster order, and what does not change: entries of a class token.
        old: Grid ``(h, w)`` of the table.
        new: Another one.
    """
    old, device = tuple(old), table.device
    if old == new:
        return table

    def make() -> tuple[torch.Tensor, ...]:
        axes = [_neighbours(*sides, device) for sides in zip(old, new, strict=True)]
        (rows, far_down), (cols, far_right) = axes
        index = rows[:, None, :, None] * (2 * old[1] - 1) + cols[:, None, :]
        weight = far_down.flip(0)[:, None, :, None] * far_right.flip(0)[:, None, :]
        total = far_down.sum(0)[:, None] * far_right.sum(0)
        return index.flatten(0, 1).flatten(1), weight.flatten(0, 1).flatten(1), total.flatten()

    if torch.compiler.is_compiling():
        index, weight, total = make()
    else:
        key = "offsets", old, device
        index, weight, total = kept(PackedGrids([new]), key, device, make)
    offsets = (2 * old[0] - 1) * (2 * old[1] - 1)
    values = table[:offsets].float()
    corners = (values[i] * w[:, None] for i, w in zip(index, weight, strict=True))
    resized = functools.reduce(torch.add, corners) / total[:, None]
    return torch.cat([resized, table[offsets:]]).to(table.dtype)


def _neighbours(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each offset along a side, those of the old table before and behind it.

    The old offsets are spread so that their distances grow by a constant ratio, and the outermost
    ones meet: close to zero nothing is stretched.

    Returns:
        Their indices, and how far they are away, each ``(2, 2 * new - 1)``.
    """
    low, high, ratio = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        too_far = (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1
        low, high = (low, ratio) if too_far else (ratio, high)
    right = [*itertools.accumulate(ratio**step for step in range(old - 1))]
    places = torch.tensor([*(-place for place in reversed(right)), 0, *right], device="cpu")
    places = to_device(places, device)
    wanted = torch.arange(1.0 - new, new, device=device)
    behind = torch.bucketize(wanted, places).clamp(max=len(places) - 1)
    before = (behind - 1).clamp(min=0)
    away = torch.stack([wanted - places[before], places[behind] - wanted]).clamp(min=0)
    # On a place, and outside, both are one: the neighbours are the same, or have the same say.
    return torch.stack([before, behind]), away.masked_fill((away == 0).all(0), 1)


class CoarseBiasBlock(CoarseBlock):
    """A block after the compressor that is given a bias which its model shares between blocks."""

    def forward(self, x: torch.Tensor, *bias: Any, **named_bias: Any) -> torch.Tensor:
        """As in the block's class; the bias, if any, is that for the fine tokens."""
        named = {name: self._merged(x, value) for name, value in named_bias.items()}
        return super().forward(x, *(self._merged(x, value) for value in bias), **named)

    def _merged(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if bias is None:
            return None
        layout, window, positions = self._layout_of(x), self.window, self.positions
        return self._derived(x, bias, lambda b: merge_bias(b, layout, window, positions))


def require_blocks(
    vit: nn.Module, config: CompressorConfig, classes: tuple[type, ...], attention: type
) -> None:
    """Refuse blocks, from the compressed one on, of another class or with another attention."""
    first = config.layers[0]
    for index, block in enumerate(vit.blocks[first:], first):
        modules.require_exactly(block, f"vit.blocks.{index}", classes)
        modules.require_exactly(block.attn, f"vit.blocks.{index}.attn", (attention,))


class PackedRelativePositions(PackedModel):
    """A model on packed views whose blocks add relative positions to their scores."""

    def biases(self, index: int, sides: Sides) -> list[Any] | None:
        """What a block adds to the scores of each view; a function where it makes that itself."""
        attn = self.blocks[index].attn
        kinds = [*zip(self.grids, self.each(sides), strict=True)]
        made = {kind: self.bias(attn, *kind) for kind in kinds}
        biases = [made[kind] for kind in kinds]
        return None if any(bias is None for bias in biases) else biases

    def bias(self, attn: nn.Module, grid: Grid, window: int) -> Any:
        """What the attention of a block adds to the scores of views of one grid.

        Args:
            attn: The attention.
            grid: Patches ``(h, w)`` of the views.
            window: Side of the windows that became one token, in patches.

        Returns:
            ``(heads, P + m, P + m)``; a function of the queries that returns it, so that it is made
            again where a block is checkpointed; or None.
        """
        raise NotImplementedError
