# SPDX-License-Identifier: Apache-2.0
"""The definition of every operator: plain PyTorch, without performance tricks.

``uhd_ops.reference.<op>`` has the signature of ``uhd_ops.<op>``, takes any float dtype and is
differentiable. It is what the kernels are tested and benchmarked against, and what runs where no
native library is loaded. It imports nothing but torch, and nothing else of the package imports it.
"""

from uhd_ops.reference.pixel_unshuffle import pixel_unshuffle
from uhd_ops.reference.pixel_unshuffle_mlp import pixel_unshuffle_mlp
from uhd_ops.reference.reorder_tokens import reorder_tokens
from uhd_ops.reference.tile_weight import tile_average, tile_block_diagonal, tile_vector
from uhd_ops.reference.view_attention import view_attention
from uhd_ops.reference.window_attention import window_attention, window_attention_qkvpacked
from uhd_ops.reference.window_mean import window_mean
from uhd_ops.reference.window_pool import window_pool

__all__ = [
    "pixel_unshuffle",
    "pixel_unshuffle_mlp",
    "reorder_tokens",
    "tile_average",
    "tile_block_diagonal",
    "tile_vector",
    "view_attention",
    "window_attention",
    "window_attention_qkvpacked",
    "window_mean",
    "window_pool",
]
