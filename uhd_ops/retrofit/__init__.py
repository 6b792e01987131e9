# SPDX-License-Identifier: Apache-2.0
"""Insert compressors into an existing vision transformer, and take them out again."""

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.training import freeze_for_stage
from uhd_ops.retrofit.insertion import (
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
    remove_progressive_compression,
)
from uhd_ops.retrofit.own_models import register_family
from uhd_ops.retrofit.patch_embedding import PatchRefinement, refine_patch_embedding
from uhd_ops.retrofit.registry import takes_compressor
from uhd_ops.retrofit.weights import load_plain_checkpoint

__all__ = [
    "CompressorConfig",
    "PatchRefinement",
    "freeze_for_stage",
    "insert_early_compressor",
    "insert_progressive_compression",
    "load_plain_checkpoint",
    "refine_patch_embedding",
    "register_family",
    "remove_early_compressor",
    "remove_progressive_compression",
    "takes_compressor",
]
