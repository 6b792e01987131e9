# SPDX-License-Identifier: Apache-2.0
"""Operators for high-resolution visual encoding in multimodal LLMs: slice, pack, compress inside the ViT."""

from uhd_ops import reference
from uhd_ops.grids import PackedGrids
from uhd_ops.ops.window_attention import window_attention

__version__ = "0.1.0"

__all__ = ["PackedGrids", "reference", "window_attention"]
