# SPDX-License-Identifier: Apache-2.0
"""``CLIPVisionModel`` and ``SiglipVisionModel`` of transformers with a compressor.

So are models that put a head on one of them: ``CLIPVisionModelWithProjection``,
``CLIPForImageClassification`` and ``SiglipForImageClassification``.
"""

from __future__ import annotations

from torch import nn

from uhd_ops._reclass import body_class
from uhd_ops.nn import checks
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import (
    CompressedHfModel,
    CompressedLayer,
    HfWrapper,
    require_understood,
)
from uhd_ops.retrofit.model import Family


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of an encoder layer: pre-norm, with separate projections."""
    checks.require_own_forward(block, "layer")
    cls = body_class(block)
    family = cls.__name__.removesuffix("EncoderLayer")
    attention = parts.attention(
        block.self_attn,
        "layer.self_attn",
        parts.sibling(cls, f"{family}Attention"),
        norm=parts.norm(block.layer_norm1, "layer.layer_norm1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, f"{family}MLP"),),
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


def check(vit: nn.Module, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_understood(transformer(vit), config, "encoder.layers", "EncoderLayer")


FAMILY = Family(
    CompressedClipVisionModel,
    CompressedLayer,
    None,
    check,
    transformer=transformer,
    wrapper=HfWrapper,
)
