# SPDX-License-Identifier: Apache-2.0
"""``Glm4vVisionModel`` and ``Glm4vMoeVisionModel`` of transformers with a compressor.

They are the towers of GLM-4.1V, 4.5V and 4.6V. As in Qwen2-VL, the merged tokens of a frame come in
2 x 2 blocks, which the model's convolution makes one token of.
"""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families._hf_packed import (
    CoarseGridLayer,
    CompressedGridModel,
    CompressedPackedLayer,
    PackedAlready,
    read_block,
    require_blocks,
)


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a block: a fused projection, RMSNorms, a gated MLP."""
    family = body_class(block).__name__.removesuffix("VisionBlock")
    mlp = {"Glm4v": "Glm4VisionMlp", "Glm4vMoe": "Glm4vMoeisionMlp"}[family]  # so it is spelt
    return read_block(block, f"{family}VisionAttention", mlp, norm=f"{family}RMSNorm")


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_blocks(vit, config)


FAMILY = Family(
    CompressedGridModel, CompressedPackedLayer, CoarseGridLayer, check, packed=PackedAlready
)
