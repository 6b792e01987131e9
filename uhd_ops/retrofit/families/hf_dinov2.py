# SPDX-License-Identifier: Apache-2.0
"""DINOv2 of transformers, with registers or without, with a compressor.

``Dinov2Model``, ``Dinov2WithRegistersModel``, the classifiers made of them, and the backbones.
"""

from __future__ import annotations

from torch import nn

from uhd_ops._reclass import body_class
from uhd_ops.nn import checks
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import (
    CompressedBackbone,
    CompressedHfModel,
    CompressedLayer,
    HfWrapper,
    require_understood,
)
from uhd_ops.retrofit.model import Family

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
    checks.require_own_forward(block, "layer")
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


def check(vit: nn.Module, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_understood(transformer(vit), config, "encoder.layer")


class CompressedDinov2Backbone(CompressedBackbone):
    """A backbone with a compressor."""

    blocks_name = "encoder.layer"


FAMILY = Family(
    CompressedDinov2Model,
    CompressedLayer,
    None,
    check,
    transformer=transformer,
    wrapper=HfWrapper,
)
BACKBONE = Family(CompressedDinov2Backbone, CompressedLayer, None, check)
