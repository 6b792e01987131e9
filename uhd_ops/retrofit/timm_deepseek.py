# SPDX-License-Identifier: Apache-2.0
"""timm's ``DeepseekVitEncoder`` and the ``DeepseekVitClassifier`` around it, with a compressor.

The aligner behind the encoder pads any grid with zeros to a multiple of three, a merged one too.
"""

from __future__ import annotations

from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from torch import nn

from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.model import Family, encoder_or_self
from uhd_ops.retrofit.rope import CoarseRopeBlock, CompressedRopeBlock
from uhd_ops.retrofit.timm_channels_last import CompressedEncoder, require_encoder


def check(vit: nn.Module, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_encoder(vit, DeepseekVitEncoder, DeepseekVitClassifier)


FAMILY = Family(
    CompressedEncoder,
    CompressedRopeBlock,
    CoarseRopeBlock,
    check,
    transformer=encoder_or_self,
)
