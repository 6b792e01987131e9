# SPDX-License-Identifier: Apache-2.0
"""timm's ``DeepseekVitEncoder`` and the ``DeepseekVitClassifier`` around it, with a compressor.

The aligner after the encoder pads any grid with zeros to a multiple of three, a merged one too.
"""

from __future__ import annotations

from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import Family, encoder_or_self
from uhd_ops.retrofit.families import timm_eva
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.families._timm_encoders import (
    CompressedEncoder,
    PackedEncoder,
    require_encoder,
)
from uhd_ops.retrofit.rope import CoarseRopeBlock, CompressedRopeBlock


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a ``DeepseekVitBlock``: pre-norm, without LayerScale."""
    modules.require_own_forward(block, "block")
    attention = timm_eva.attention(block.attn, "block.attn", **parts.around(block, 1))
    mlp = parts.mlp(block.mlp, "block.mlp", **parts.around(block, 2))
    return BlockSpec(attention.proj.out_features, (attention,), (mlp,), block=block)


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_encoder(vit, DeepseekVitEncoder, DeepseekVitClassifier)


FAMILY = Family(
    CompressedEncoder,
    CompressedRopeBlock,
    CoarseRopeBlock,
    check,
    transformer=encoder_or_self,
    packed=PackedEncoder,
)
