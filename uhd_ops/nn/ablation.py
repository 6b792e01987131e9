# SPDX-License-Identifier: Apache-2.0
"""The variants of LLaVA-UHD v4's ablation, Table 4, by their options."""

from types import MappingProxyType

ABLATION = MappingProxyType(
    {
        "average pool": {"attention": "none", "mlp": "none"},
        "pixel-unshuffle MLP": {"attention": "none", "mlp": "plain"},
        "reused MLP": {"attention": "none", "mlp": "reuse"},
        "cross-attention, top-left query": {"attention": "cross_top_left", "mlp": "reuse"},
        "cross-attention, mean query": {"attention": "cross_mean", "mlp": "reuse"},
        "window attention + MLP": {"attention": "window", "mlp": "plain"},
        "window attention + reused MLP": {"attention": "window", "mlp": "reuse"},
    }
)
"""Options of ``insert_early_compressor`` and ``EarlyCompressor`` for each variant, by its name.

The baseline of the table, "post-ViT", is the untouched model with
``PixelUnshuffleConnector(merger_times=2)`` behind it.
"""
