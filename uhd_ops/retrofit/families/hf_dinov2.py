# SPDX-License-Identifier: Apache-2.0
"""DINOv2 of transformers, with registers or without, with a compressor.

``Dinov2Model``, ``Dinov2WithRegistersModel``, the classifiers made of them, and the backbones.
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
    CompressedBackbone,
    CompressedHfModel,
    CompressedLayer,
    HfWrapper,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Sides

# Layer -> (what the names of its parts begin with, its DropPath, its gated MLP).
_NAMES = {
    "Dinov2Layer": ("Dinov2", "Dinov2DropPath", "Dinov2SwiGLUFFN"),
    "Dinov2WithRegistersLayer": (
        "Dinov2WithRegisters",
        "Dinov2WithRegistersDropPath",
        "Dinov2WithRegistersSwiGLUFFN",
    ),
    "DINOv3ViTLayer": ("DINOv3ViT", "Dinov3ViTDropPath", "DINOv3ViTGatedMLP"),
}


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a layer: pre-norm, with LayerScale and one DropPath for both branches."""
    modules.require_own_forward(block, "layer")
    cls = body_class(block)
    family, drop_path, gated_mlp = _NAMES[cls.__name__]
    scale = parts.sibling(cls, f"{family}LayerScale")
    drop = parts.drop_path(block.drop_path, "layer.drop_path", parts.sibling(cls, drop_path))
    attention = parts.attention(
        block.attention,
        "layer.attention",
        parts.sibling(cls, f"{family}Attention"),
        norm=parts.norm(block.norm1, "layer.norm1"),
        post=parts.layer_scale(block.layer_scale1, "layer.layer_scale1", scale),
        drop_path=drop,
        rotate_half=True,
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, f"{family}MLP"), parts.sibling(cls, gated_mlp)),
        norm=parts.norm(block.norm2, "layer.norm2"),
        post=parts.layer_scale(block.layer_scale2, "layer.layer_scale2", scale),
        drop_path=drop,
    )
    dim = block.norm1.normalized_shape[0]
    return BlockSpec(dim, (attention,), (mlp,), block=block, name="layer")


class CompressedDinov2Model(CompressedHfModel):
    """A model with a compressor."""

    blocks_name = "encoder.layer"


def transformer(vit: nn.Module) -> nn.Module:
    """Return the model that a classifier is made of."""
    return getattr(vit, vit.base_model_prefix, vit)


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(transformer(vit), config, "encoder.layer")


class CompressedDinov2Backbone(CompressedBackbone):
    """A backbone with a compressor."""

    blocks_name = "encoder.layer"


class PackedDinov2(PackedHfModel):
    """A DINOv2 on packed views."""

    blocks_name = "encoder.layer"
    position_names = ("embeddings.position_embeddings",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution."""
        conv = self.vit.embeddings.patch_embeddings.projection
        return self.convolve(conv, pixels.to(conv.weight.dtype))

    def prefix(self) -> torch.Tensor:
        """The class token with its position, then registers without any."""
        embeddings = self.vit.embeddings
        cls = embeddings.cls_token + embeddings.position_embeddings[:, :1]
        registers = getattr(embeddings, "register_tokens", None)
        return cls if registers is None else torch.cat([cls, registers], 1)

    def absolute(self, grid: Grid) -> torch.Tensor:
        """As the model resamples them."""
        table = self.vit.embeddings.position_embeddings
        return self._interpolated(1, grid, table.shape[-1])[1:]

    def learned(self) -> torch.Tensor:
        """Without that of the class token."""
        table = self.vit.embeddings.position_embeddings[0, 1:]
        return table.unflatten(0, (math.isqrt(len(table)), -1))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout."""
        return self.vit.embeddings.dropout(x)

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm, unless a backbone is told to return its maps without."""
        if not getattr(self.vit.config, "apply_layernorm", True):
            return prefix, patches
        return self.vit.layernorm(prefix), self.vit.layernorm(patches)


FAMILY = Family(
    CompressedDinov2Model,
    CompressedLayer,
    None,
    check,
    transformer=transformer,
    wrapper=HfWrapper,
    packed=PackedDinov2,
)
BACKBONE = Family(CompressedDinov2Backbone, CompressedLayer, None, check, packed=PackedDinov2)
