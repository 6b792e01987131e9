# SPDX-License-Identifier: Apache-2.0
"""``Glm4vVisionModel`` of transformers (GLM-4.1V, 4.5V and 4.6V) with a compressor.

As in Qwen2-VL, the merged tokens of a frame come in 2 x 2 blocks, which the model's convolution
makes one token of.
"""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
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
    return read_block(block, "Glm4vVisionAttention", "Glm4VisionMlp", norm="Glm4vRMSNorm")


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_blocks(vit, config, "blocks", "Glm4vVisionBlock")


FAMILY = Family(
    CompressedGridModel, CompressedPackedLayer, CoarseGridLayer, check, packed=PackedAlready
)
