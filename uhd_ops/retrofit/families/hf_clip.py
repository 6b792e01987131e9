# SPDX-License-Identifier: Apache-2.0
"""The vision models of CLIP, SigLIP and Janus in transformers with a compressor.

Likewise models that put a head on one of them: ``CLIPVisionModelWithProjection``,
``CLIPForImageClassification`` and ``SiglipForImageClassification``.
"""

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
    HfWrapper,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Sides


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of an encoder layer: pre-norm, with separate projections."""
    modules.require_own_forward(block, "layer")
    cls = body_class(block)
    family = cls.__name__.removesuffix("EncoderLayer").removesuffix("Vision")
    attention = parts.attention(
        block.self_attn,
        "layer.self_attn",
        parts.sibling(cls, f"{family}VisionAttention", f"{family}Attention"),
        norm=parts.norm(block.layer_norm1, "layer.layer_norm1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, f"{family}VisionMLP", f"{family}MLP"),),
        norm=parts.norm(block.layer_norm2, "layer.layer_norm2"),
    )
    dim = block.layer_norm1.normalized_shape[0]
    return BlockSpec(dim, (attention,), (mlp,), block=block, name="layer")


class CompressedClipVisionModel(CompressedHfModel):
    """A vision model with a compressor."""

    blocks_name = "encoder.layers"

    def _patch_embedding(self) -> nn.Conv2d:
        return self.embeddings.patch_embedding

    def _num_prefix_tokens(self) -> int:
        return self.embeddings.num_positions - self.embeddings.num_patches


def transformer(vit: nn.Module) -> nn.Module:
    """Return the vision model of one that puts a head on it."""
    return getattr(vit, "vision_model", vit)


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(transformer(vit), config, "encoder.layers", "EncoderLayer")


class PackedClip(PackedHfModel):
    """A vision model of CLIP, SigLIP or Janus on packed views."""

    blocks_name = "encoder.layers"
    position_names = ("embeddings.position_embedding",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution."""
        conv = self.vit.embeddings.patch_embedding
        return self.convolve(conv, pixels.to(conv.weight.dtype))

    def prefix(self) -> torch.Tensor | None:
        """The class token of CLIP."""
        embeddings = self.vit.embeddings
        if not hasattr(embeddings, "class_embedding"):
            return None
        return (embeddings.class_embedding + embeddings.position_embedding.weight[0])[None, None]

    def absolute(self, grid: Grid) -> torch.Tensor:
        """As ``interpolate_pos_encoding=True`` resamples them."""
        return self._interpolated(self._prefix, grid, self.vit.embeddings.embed_dim)[self._prefix :]

    def learned(self) -> torch.Tensor:
        """Without that of the class token."""
        table = self.vit.embeddings.position_embedding.weight[self._prefix :]
        return table.unflatten(0, (math.isqrt(len(table)), -1))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The norm in front of CLIP's first layer."""
        return getattr(self.vit, "pre_layrnorm", nn.Identity())(x)

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SigLIP's norm; CLIP's is for the class token that it pools."""
        if self._prefix:
            return prefix, patches
        return prefix, self.vit.post_layernorm(patches)

    @property
    def _prefix(self) -> int:
        return self.vit.embeddings.num_positions - self.vit.embeddings.num_patches


FAMILY = Family(
    CompressedClipVisionModel,
    CompressedLayer,
    None,
    check,
    transformer=transformer,
    wrapper=HfWrapper,
    packed=PackedClip,
)
