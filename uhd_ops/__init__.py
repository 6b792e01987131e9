# SPDX-License-Identifier: Apache-2.0
"""Operators for high-resolution visual encoding: slice, pack, compress inside the ViT."""

from uhd_ops import flops, integrations, nn, plot, reference
from uhd_ops._build_info import build_info
from uhd_ops._cache import clear_caches, set_cache_limit
from uhd_ops._native import definitions
from uhd_ops.corpus import encode_dataset, open_dataset
from uhd_ops.grids import PackedGrids
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.pixel_unshuffle_mlp import pixel_unshuffle_mlp
from uhd_ops.ops.reorder_tokens import reorder_tokens
from uhd_ops.ops.tile_weight import tile_average, tile_block_diagonal, tile_vector
from uhd_ops.ops.view_attention import view_attention
from uhd_ops.ops.window_attention import window_attention, window_attention_qkvpacked
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.ops.window_pool import window_pool
from uhd_ops.padded_grids import PaddedGrids
from uhd_ops.retrofit import (
    freeze_for_stage,
    insert_early_compressor,
    insert_progressive_compression,
    load_plain_checkpoint,
    refine_patch_embedding,
    register_family,
    remove_early_compressor,
    remove_progressive_compression,
)
from uhd_ops.slicing import (
    SlicePlan,
    load_image,
    pack_batches,
    pack_views,
    plan_native,
    plan_slices,
    plan_slices_batch,
    slice_image,
)

__version__ = "0.1.0"

__all__ = [
    "PackedGrids",
    "PaddedGrids",
    "SlicePlan",
    "build_info",
    "clear_caches",
    "definitions",
    "encode_dataset",
    "flops",
    "freeze_for_stage",
    "insert_early_compressor",
    "insert_progressive_compression",
    "integrations",
    "load_image",
    "load_plain_checkpoint",
    "nn",
    "open_dataset",
    "pack_batches",
    "pack_views",
    "pixel_unshuffle",
    "pixel_unshuffle_mlp",
    "plan_native",
    "plan_slices",
    "plan_slices_batch",
    "plot",
    "reference",
    "refine_patch_embedding",
    "register_family",
    "remove_early_compressor",
    "remove_progressive_compression",
    "reorder_tokens",
    "set_cache_limit",
    "slice_image",
    "tile_average",
    "tile_block_diagonal",
    "tile_vector",
    "view_attention",
    "window_attention",
    "window_attention_qkvpacked",
    "window_mean",
    "window_pool",
]
