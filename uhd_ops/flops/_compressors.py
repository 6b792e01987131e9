# SPDX-License-Identifier: Apache-2.0
"""What the kinds of compressors cost."""

from __future__ import annotations

from typing import NamedTuple

from uhd_ops.flops.config import ViTConfig
from uhd_ops.flops.report import LayerCount
from uhd_ops.grids import PackedGrids
from uhd_ops.nn.attention import QUERIES
from uhd_ops.nn.early_compressor import CompressorConfig


class Counting(NamedTuple):
    """Operations per element beside the matrix products."""

    score: int  # scale and softmax, per head and per pair of query and key
    norm: int
    activation: int
    addition: int  # of residuals and of the mean over a window


# Several neighbouring choices of norm, activation and addition fit the paper's ten totals after
# rounding; the four operations per score are common to all that do.
COUNTINGS = {"macs": Counting(0, 0, 0, 0), "paper": Counting(4, 5, 1, 1)}


def compressor_row(
    name: str,
    vit: ViTConfig,
    grids: PackedGrids,
    config: CompressorConfig,
    per: Counting,
    full_window_attention: bool,
    concatenate: bool,
) -> LayerCount:
    """Count one compressor of the patches on ``grids``; prefix tokens do not enter it."""
    if config.pool is not None:
        return _pool(name, vit, grids, config, per, concatenate)
    merged = grids.num_windows(config.window)
    attend = _cross_attention if config.attention in QUERIES else _ATTENTIONS[config.attention]
    linear, attention, elementwise = attend(vit, grids, config.window, per, full_window_attention)
    mlp_linear, mlp_elementwise = _mlp(vit, merged, config, per)
    if config.attention not in QUERIES:
        elementwise += per.addition * grids.num_tokens * vit.dim  # the mean over each window
    return LayerCount(
        name, grids.num_tokens, linear + mlp_linear, attention, elementwise + mlp_elementwise
    )


def window_pairs(grids: PackedGrids, window: int) -> int:
    """Pairs of query and key over all windows, ragged ones included."""
    return sum(_squares(height, window) * _squares(width, window) for height, width in grids)


def _squares(side: int, window: int) -> int:
    full, rest = divmod(side, window)
    return full * window**2 + rest**2


def _pool(
    name: str,
    vit: ViTConfig,
    grids: PackedGrids,
    config: CompressorConfig,
    per: Counting,
    concatenate: bool,
) -> LayerCount:
    tokens, merged, dim = grids.num_tokens, grids.num_windows(config.window), vit.dim
    hidden = dim if config.hidden_dim is None else config.hidden_dim
    if config.pool == "mean":
        linear, elementwise = 0, tokens * per.addition * dim
    elif config.pool == "unshuffle":
        linear = merged * (config.window**2 * dim * hidden + hidden * dim)
        elementwise = merged * per.activation * hidden
    else:
        means = tokens if concatenate else merged
        linear = (2 * tokens + means) * dim * hidden
        # Each token is one weight per channel: a score, and a term of the mean and of the result.
        elementwise = tokens * (per.activation * hidden + (per.score + 2 * per.addition) * dim)
    return LayerCount(name, tokens, linear, elementwise=elementwise)


def _no_attention(*_: object) -> tuple[int, int, int]:
    return 0, 0, 0


def _window_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: Counting, full: bool
) -> tuple[int, int, int]:
    tokens = grids.num_tokens
    if full:
        pairs = sum((height * width) ** 2 for height, width in grids)
    else:
        pairs = window_pairs(grids, window)
    elementwise = per.score * pairs * vit.heads + (per.norm + per.addition) * tokens * vit.dim
    return 4 * tokens * vit.dim**2, 2 * pairs * vit.dim, elementwise


_ATTENTIONS = {"none": _no_attention, "window": _window_attention}


def _cross_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: Counting, full: bool
) -> tuple[int, int, int]:
    # Queries, keys and values of all tokens, one query per window: the only split that fits the
    # paper's total. Keys that a ragged window lacks are masked, not skipped.
    tokens, merged = grids.num_tokens, grids.num_windows(window)
    pairs = merged * window**2
    elementwise = per.score * pairs * vit.heads
    elementwise += (per.norm * tokens + per.addition * merged) * vit.dim
    return (3 * tokens + merged) * vit.dim**2, 2 * pairs * vit.dim, elementwise


def _mlp(vit: ViTConfig, merged: int, config: CompressorConfig, per: Counting) -> tuple[int, int]:
    if config.mlp == "none":
        return 0, 0
    cells = config.window**2  # tokens of a window; ragged windows repeat theirs to fill it
    dim, wide = vit.dim, cells * vit.dim
    if config.mlp == "plain":
        linear, hidden = wide * wide + wide * dim, wide
    elif config.attention in QUERIES:
        linear, hidden, wide = 2 * dim * vit.mlp_hidden, vit.mlp_hidden, dim
    else:
        hidden = cells * vit.mlp_hidden
        linear = _reused_mlp(dim, vit.mlp_hidden, cells)[config.form]
    elementwise = per.norm * wide + per.activation * hidden + per.addition * dim
    return merged * linear, merged * elementwise


def _reused_mlp(dim: int, hidden: int, cells: int) -> dict[str, int]:
    """MACs per merged token: fc1, then fc2; the tied form averages before its fc2."""
    one = dim * hidden
    return {
        "dense": cells * cells * one + cells * one,
        "block": cells * one + cells * one,
        "tied": cells * one + one,
    }
