# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformerSAM`` with a compressor.

Its blocks work on maps ``(B, h, w, C)`` and most attend in windows of their own, 14 x 14 tokens.
Behind the compressor a merged token covers ``window`` tokens. With ``positions="center"`` the own
windows keep their extent in the image, ``ceil(14 / window)`` merged tokens, and all distances are
those between the tokens' places in the image. With ``"reindex"`` merged tokens count as the host's
own do: 14 x 14 merged tokens, ``window`` times the extent, at distances of their indices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from timm import layers
from timm.models import vision_transformer_sam as sam
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import BlockSpec, OwnAttentionSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.nn.positions import Rotary
from uhd_ops.nn.score_bias import DecomposedPositionBias
from uhd_ops.ops.view_attention import by_group
from uhd_ops.retrofit.adapter import (
    CoarseBlock,
    CoarsePart,
    CompressedBlock,
    CompressedModel,
    Family,
    refuse_patch_dropout,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid, Sides
from uhd_ops.retrofit.relative_positions import (
    StandIn,
    require_blocks,
    stride_of,
)


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a ``Block``: pre-norm, with vectors for relative positions.

    The windows that the block itself may attend in say nothing about those of the compressor.
    """
    modules.require_own_forward(block, "block")
    if block.attn.rope is not None:
        raise NotImplementedError(
            "block.attn.rope must be None: rotary embeddings of a VisionTransformerSAM are for one "
            "grid, and are not supported"
        )
    attention = parts.attention(
        block.attn,
        "block.attn",
        (sam.Attention,),
        score_bias=_score_bias(block.attn),
        **parts.around(block, 1, "ls"),
    )
    mlp = parts.mlp(block.mlp, "block.mlp", **parts.around(block, 2, "ls"))
    return BlockSpec(block.attn.qkv.in_features, (attention,), (mlp,), block=block)


def _score_bias(module: nn.Module) -> functools.partial | None:
    if not module.use_rel_pos:
        return None
    modules.require_plain(module, "block.attn", ("rel_pos_h", "rel_pos_w"))
    return functools.partial(DecomposedPositionBias.from_grid, module.rel_pos_h, module.rel_pos_w)


class MapLayout(NamedTuple):
    """Tokens as a map ``(B, h, w, C)``.

    Attributes:
        height: Rows h.
        width: Columns w.
    """

    height: int
    width: int

    def merged(self, window: int) -> MapLayout:
        """The layout after the compressor."""
        return MapLayout(-(-self.height // window), -(-self.width // window))

    @property
    def places(self) -> tuple[int, int]:
        """What tells it from other layouts of the same model."""
        return tuple(self)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is a map of that size."""
        return tuple(x.shape[1:3]) == self

    def check(self, x: torch.Tensor) -> None:
        """Refuse a map of another size."""
        if not self.holds(x):
            raise ValueError(
                f"x must be a map of {self.height} x {self.width} tokens, (B, h, w, C), "
                f"got shape {tuple(x.shape)}"
            )

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the map."""
        merged = compressor(x.flatten(1, 2), tuple(self), positions)
        return merged.unflatten(1, self.merged(compressor.window))


_METHODS = ("forward", "forward_features", "forward_intermediates")


class CompressedSam(CompressedModel):
    """A VisionTransformerSAM with a compressor."""

    # What leaves the blocks is a map already, of the grid that it has.
    _intermediates = CompressedModel._run

    def _layout(self, x: torch.Tensor, **options: Any) -> MapLayout:
        refuse_patch_dropout(self)
        return MapLayout(*self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1])))


class CoarseSamBlock(CoarseBlock):
    """A block after the compressor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, h, w, C)`` to the same; the own windows of the block hold merged tokens."""
        if self.window_size:
            fine = (self.window_size, self.window_size)
        else:
            fine = tuple(self._layout_of(x))
        stride = stride_of(self.window, self.positions)
        merged = StandIn(
            self,
            window_size=-(-self.window_size // stride),
            attn=functools.partial(self.attn, fine=fine),
        )
        return body_class(self).forward(merged, x)


class CoarseSamAttention(CoarsePart):
    """The attention of a block after the compressor."""

    def forward(self, x: torch.Tensor, fine: tuple[int, int]) -> torch.Tensor:
        """Attend in maps ``(B, h, w, C)`` that cover ``fine`` rows and columns of the host's."""
        return strided_attention(self, x, fine, stride_of(self.window, self.positions))


def strided_attention(
    attn: sam.Attention, x: torch.Tensor, fine: tuple[int, int], stride: int
) -> torch.Tensor:
    """Attend in maps of merged tokens.

    Args:
        attn: The attention.
        x: Maps ``(B, h, w, C)``.
        fine: Rows and columns of the host's map that they cover.
        stride: Distance of merged neighbours in the host's tokens.
    """
    if not attn.use_rel_pos:
        return sam.Attention.forward(attn, x)
    rows = _strided(attn.rel_pos_h, fine[0], x.shape[1], stride)
    cols = _strided(attn.rel_pos_w, fine[1], x.shape[2], stride)
    return sam.Attention.forward(StandIn(attn, rel_pos_h=rows, rel_pos_w=cols), x)


def _strided(table: torch.Tensor, fine: int, merged: int, stride: int) -> torch.Tensor:
    """Give offset d of merged tokens the vector that the host has for offset ``stride * d``.

    Args:
        table: Vectors ``(any, D)`` by offset; the host resizes them to ``fine``.
        fine: Tokens along this side of the host's map.
        merged: Merged tokens along it.
        stride: Distance of merged neighbours in the host's tokens.

    Returns:
        ``(2 * merged - 1, D)``
    """
    last = stride * (merged - 1) + 1
    vectors = sam.get_rel_pos(fine, fine, table)[:last:stride, :last:stride]  # query, key
    return torch.cat([vectors[0].flip(0), vectors[1:, 0]])


class SamScope(ViewScope):
    """Views of one grid, which attend as maps by the attention module of a block.

    Args:
        model: The model.
        index: Index of the block.
        sides: As for :meth:`PackedModel.scope`.
    """

    def __init__(self, model: PackedSam, index: int, sides: Sides) -> None:
        super().__init__(model.merged_grids(sides))
        self.model, self.index, self.sides = model, index, model.each(sides)

    def run_module(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Attend in the block's own windows, or in whole maps."""
        block = self.model.blocks[self.index]
        kinds = [*zip(self.model.grids, self.sides, strict=True)]

        def run(views: list[torch.Tensor], first: int) -> torch.Tensor:
            return self.model.attend(block, views[0], *kinds[first])

        return by_group(run, (x,), self.lengths, kinds)


class PackedSam(parts.PackedTimm):
    """A VisionTransformerSAM on packed views.

    The attention of a block, whose windows may stick out of a map, is computed by its own module.
    """

    methods = ("forward_features",)
    tail_names = ("neck",)

    def absolute(self, grid: Grid) -> torch.Tensor | None:
        """Resampled as the model does."""
        if self.vit.pos_embed is None:
            return None
        return layers.resample_abs_pos_embed_nhwc(self.vit.pos_embed, list(grid)).flatten(0, -2)

    def learned(self) -> torch.Tensor | None:
        """The whole table."""
        return None if self.vit.pos_embed is None else self.vit.pos_embed[0]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout and the norm in front of the first block."""
        return self.vit.norm_pre(self.vit.pos_drop(x))

    def read(self, index: int) -> BlockSpec:
        """As it is read, but for the attention."""
        spec = super().read(index)
        (part,) = spec.attentions
        own = OwnAttentionSpec(
            self.blocks[index].attn, norm=part.norm, post=part.post, drop_path=part.drop_path
        )
        return dataclasses.replace(spec, attentions=(own,))

    def views_scope(self, index: int, sides: Sides, prefix: int) -> SamScope:
        """Maps of the views."""
        return SamScope(self, index, sides)

    def attend(self, block: nn.Module, x: torch.Tensor, grid: Grid, window: int) -> torch.Tensor:
        """Attend in views ``(n, m, C)`` of one grid, whose windows became one token."""
        height, width = (-(-side // window) for side in grid)
        stride = stride_of(window, self.merged_positions)
        padded = height, width
        x, side = x.unflatten(1, padded), -(-block.window_size // stride)
        if side:
            x, padded = sam.window_partition(x, side)
        if window > 1:
            fine = (block.window_size,) * 2 if side else grid
            x = strided_attention(block.attn, x, fine, stride)
        else:
            x = sam.Attention.forward(block.attn, x)
        if side:
            x = sam.window_unpartition(x, side, (height, width), padded)
        return x.flatten(1, 2)

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The neck, which convolves the map of each view."""

        def neck(views: torch.Tensor, grid: Grid) -> torch.Tensor:
            maps = self.vit.neck(views.unflatten(1, grid).permute(0, 3, 1, 2))
            return maps.flatten(2).transpose(1, 2)

        out = self.by_grid(neck, patches, sides)
        return out.new_empty((self.grids.num_views, 0, out.shape[-1])), out


def check(vit: sam.VisionTransformerSAM, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, sam.VisionTransformerSAM, _METHODS)
    parts.require_patch_embedding(vit)
    require_blocks(vit, config, (sam.Block,), sam.Attention)


FAMILY = Family(
    CompressedSam,
    CompressedBlock,
    CoarseSamBlock,
    check,
    parts={"attn": CoarseSamAttention},
    packed=PackedSam,
)
