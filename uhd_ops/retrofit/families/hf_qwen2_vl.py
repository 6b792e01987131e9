# SPDX-License-Identifier: Apache-2.0
"""``Qwen2VisionTransformerPretrainedModel`` of transformers (Qwen2-VL) with a compressor.

The patches of a frame come in 2 x 2 blocks; so do the merged tokens, which the model's own merger
then merges again. A language model gets a 16th of the patches instead of a quarter, with windows of
two, and the sides of a frame must be multiples of four patches.
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
    """Return the parts of a block: a fused projection, LayerNorms."""
    return read_block(block, "VisionAttention", "VisionMlp")


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_blocks(vit, config, "blocks", "Qwen2VLVisionBlock")


FAMILY = Family(
    CompressedGridModel, CompressedPackedLayer, CoarseGridLayer, check, packed=PackedAlready
)
