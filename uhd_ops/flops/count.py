# SPDX-License-Identifier: Apache-2.0
"""Count the operations of a ViT with or without a compressor."""

from __future__ import annotations

from typing import NamedTuple

from uhd_ops.flops.config import CompressorConfig, ViTConfig
from uhd_ops.flops.report import FlopReport, LayerCount
from uhd_ops.grids import Grids, PackedGrids


class _Counting(NamedTuple):
    """Operations per element beside the matrix products."""

    score: int  # scale and softmax, per head and per pair of query and key
    norm: int
    activation: int
    addition: int  # of residuals and of the mean over a window


# Several neighbouring choices of norm, activation and addition fit the paper's ten totals after
# rounding; the four operations per score are common to all that do.
_COUNTINGS = {"macs": _Counting(0, 0, 0, 0), "paper": _Counting(4, 5, 1, 1)}


def count_vit(
    vit: ViTConfig,
    grids: Grids,
    compressor: CompressorConfig | None = None,
    *,
    counting: str = "macs",
    full_window_attention: bool | None = None,
) -> FlopReport:
    """Count the operations of one forward pass over packed views.

    From the patch embedding to the last block; every view attends inside itself only. Position
    embeddings, the final norm, and any head or connector are left out, as in the paper.

    Args:
        vit: Sizes of the encoder.
        grids: Patch grids of the views, in any accepted form.
        compressor: Structure of the compressor; None for an encoder without one.
        counting: ``"macs"`` for the matrix products only, ``"paper"`` for the counting of LLaVA-UHD
            v4.
        full_window_attention: Count the window attention as attention over the whole view. None
            means what the counting is known for: True for ``"paper"``, False for ``"macs"``.

    Returns:
        Rows ``patch_embed``, ``blocks.0`` ... and ``compressor`` after the block that it follows.

    Raises:
        TypeError: ``grids`` has no accepted form.
        ValueError: ``counting`` is unknown, or ``compressor.layer`` is not a block of the encoder.

    Source:
        LLaVA-UHD v4, table 4 and its ablation of the layer; the operations per element were fitted
        to these tables.
    """
    if counting not in _COUNTINGS:
        raise ValueError(f"counting must be one of {tuple(_COUNTINGS)}, got {counting!r}")
    if compressor is not None and compressor.layer >= vit.depth:
        raise ValueError(
            f"compressor.layer must be below the depth of the encoder, {vit.depth}, "
            f"got {compressor.layer}"
        )
    if full_window_attention is None:
        full_window_attention = counting == "paper"
    per = _COUNTINGS[counting]
    grids = PackedGrids.of(grids)
    patch_embed = grids.num_tokens * vit.dim * vit.in_channels * vit.patch**2
    layers = [LayerCount("patch_embed", grids.num_tokens, patch_embed)]
    for index in range(vit.depth):
        layers.append(_block(f"blocks.{index}", vit, grids, per))
        if compressor is not None and index == compressor.layer:
            layers.append(_compressor(vit, grids, compressor, per, full_window_attention))
            grids = grids.merged(compressor.window)
    return FlopReport(tuple(layers), counting)


def _view_tokens(vit: ViTConfig, grids: PackedGrids) -> list[int]:
    return [height * width + vit.prefix_tokens for height, width in grids]


def _block(name: str, vit: ViTConfig, grids: PackedGrids, per: _Counting) -> LayerCount:
    views = _view_tokens(vit, grids)
    tokens, pairs = sum(views), sum(n * n for n in views)
    dim, hidden = vit.dim, vit.mlp_hidden
    return LayerCount(
        name,
        tokens,
        linear=tokens * (4 * dim * dim + 2 * dim * hidden),
        attention=2 * pairs * dim,
        elementwise=per.score * pairs * vit.heads
        + per.activation * tokens * hidden
        + 2 * (per.norm + per.addition) * tokens * dim,
    )


def _compressor(
    vit: ViTConfig,
    grids: PackedGrids,
    compressor: CompressorConfig,
    per: _Counting,
    full_window_attention: bool,
) -> LayerCount:
    merged = grids.num_windows(compressor.window)
    attend = {None: _no_attention, "window": _window_attention, "cross": _cross_attention}
    linear, attention, elementwise = attend[compressor.attention](
        vit, grids, compressor.window, per, full_window_attention
    )
    mlp_linear, mlp_elementwise = _mlp(vit, merged, compressor, per)
    if compressor.attention != "cross":
        elementwise += per.addition * grids.num_tokens * vit.dim  # the mean over each window
    tokens = sum(_view_tokens(vit, grids))
    return LayerCount(
        "compressor", tokens, linear + mlp_linear, attention, elementwise + mlp_elementwise
    )


def _no_attention(*_: object) -> tuple[int, int, int]:
    return 0, 0, 0


def _window_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: _Counting, full: bool
) -> tuple[int, int, int]:
    tokens = grids.num_tokens
    pairs = (
        sum((height * width) ** 2 for height, width in grids)
        if full
        else _window_pairs(grids, window)
    )
    elementwise = per.score * pairs * vit.heads + (per.norm + per.addition) * tokens * vit.dim
    return 4 * tokens * vit.dim**2, 2 * pairs * vit.dim, elementwise


def _cross_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: _Counting, full: bool
) -> tuple[int, int, int]:
    # Queries, keys and values of all tokens, one query per window: the only split that fits the
    # paper's total.
    tokens, merged = grids.num_tokens, grids.num_windows(window)
    pairs = tokens  # every token is the key of its window's one query
    elementwise = per.score * pairs * vit.heads
    elementwise += (per.norm * tokens + per.addition * merged) * vit.dim
    return (3 * tokens + merged) * vit.dim**2, 2 * pairs * vit.dim, elementwise


def _mlp(
    vit: ViTConfig, merged: int, compressor: CompressorConfig, per: _Counting
) -> tuple[int, int]:
    if compressor.mlp is None:
        return 0, 0
    cells = compressor.window**2  # tokens of a window; ragged windows repeat theirs to fill it
    dim, wide = vit.dim, cells * vit.dim
    if compressor.mlp == "plain":
        linear, hidden = wide * wide + wide * dim, wide
    elif compressor.attention == "cross":
        linear, hidden, wide = 2 * dim * vit.mlp_hidden, vit.mlp_hidden, dim
    else:
        hidden = cells * vit.mlp_hidden
        linear = _reused_mlp(dim, vit.mlp_hidden, cells)[compressor.form]
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


def _window_pairs(grids: PackedGrids, window: int) -> int:
    """Pairs of query and key over all windows, ragged ones included."""
    return sum(_squares(height, window) * _squares(width, window) for height, width in grids)


def _squares(side: int, window: int) -> int:
    full, rest = divmod(side, window)
    return full * window**2 + rest**2
