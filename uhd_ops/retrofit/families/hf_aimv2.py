# SPDX-License-Identifier: Apache-2.0
"""``Aimv2VisionModel`` of transformers with a compressor, of fixed or of native resolution."""

from __future__ import annotations

import math

import torch
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import (
    CompressedHfModel,
    CompressedLayer,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Sides
from uhd_ops.retrofit.relative_positions import StandIn


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a layer: RMSNorms, separate projections, a gated MLP."""
    modules.require_own_forward(block, "layer")
    cls = body_class(block)
    norm = parts.sibling(cls, "Aimv2RMSNorm")
    attention = parts.attention(
        block.attention,
        "layer.attention",
        parts.sibling(cls, "Aimv2Attention"),
        norm=parts.norm(block.rms_norm1, "layer.rms_norm1", norm),
    )
    mlp = parts.mlp(
        block.ffn,
        "layer.ffn",
        (parts.sibling(cls, "Aimv2MLP"),),
        norm=parts.norm(block.rms_norm2, "layer.rms_norm2", norm),
    )
    return BlockSpec(block.attention.embed_dim, (attention,), (mlp,), block=block, name="layer")


class CompressedAimv2VisionModel(CompressedHfModel):
    """A vision model with a compressor."""

    blocks_name = "encoder.layers"

    def _patch_embedding(self) -> nn.Conv2d:
        return self.embeddings.patch_embed

    def _num_prefix_tokens(self) -> int:
        return 0


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "encoder.layers", "EncoderLayer")


class PackedAimv2(PackedHfModel):
    """An AIMv2 on packed views."""

    blocks_name = "encoder.layers"
    position_names = ("embeddings.position_embedding",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution, and the norm behind it."""
        embeddings = self.vit.embeddings
        return embeddings.rms_norm(self.convolve(embeddings.patch_embed, pixels))

    def absolute(self, grid: Grid) -> torch.Tensor:
        """What the model adds to an image of this grid, here to one whose embedding is zero.

        Raises:
            ValueError: The model has positions for another grid only.
        """
        table = self.learned()
        if table is not None and grid != table.shape[:2]:
            side = len(table)
            raise ValueError(
                f"views must have the {side} x {side} patches that the model has positions for, or "
                f'positions must be "nearest", got a view of {grid[0]} x {grid[1]}'
            )
        embeddings, conv = self.vit.embeddings, self.vit.embeddings.patch_embed
        zeros = conv.weight.new_zeros((1, conv.out_channels, *grid))
        without = StandIn(
            embeddings, patch_embed=lambda pixels: zeros, rms_norm=lambda tokens: tokens
        )
        rows, cols = self.patch_size(self.vit)
        image = conv.weight.new_empty(()).expand(1, 1, grid[0] * rows, grid[1] * cols)
        return type(embeddings).forward(without, image)[0]

    def learned(self) -> torch.Tensor | None:
        """The table of a model of fixed resolution; those of native resolution compute theirs."""
        if self.vit.config.is_native:
            return None
        table = self.vit.embeddings.position_embedding.weight
        return table.unflatten(0, (math.isqrt(len(table)), -1))

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm after the last layer."""
        return prefix, self.vit.rms_norm(patches)


FAMILY = Family(CompressedAimv2VisionModel, CompressedLayer, None, check, packed=PackedAimv2)
