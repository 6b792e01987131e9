# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``VisionTransformerRelPos``."""

from __future__ import annotations

import functools

import torch
from timm import layers
from timm.models import vision_transformer_relpos
from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.layers import clone_module
from uhd_ops.nn.score_bias import RelativePositionBias


def read(block: nn.Module, shared_bias: nn.Module | None = None) -> HostBlock:
    """Return the parts of a ``RelPosBlock``, pre-norm, or of a ``ResPostRelPosBlock``, post-norm.

    Args:
        block: The block.
        shared_bias: The model's ``shared_rel_pos``; used by blocks that have no bias of their own.
    """
    checks.require_own_forward(block, "block")
    bias = shared_bias if block.attn.rel_pos is None else block.attn.rel_pos
    attention = parts.attention(
        block.attn,
        "block.attn",
        (vision_transformer_relpos.RelPosAttention,),
        score_bias=None if bias is None else functools.partial(_score_bias, bias),
        **_around(block, 1),
    )
    mlp = parts.mlp(block.mlp, "block.mlp", **_around(block, 2))
    return checks.check_shapes(HostBlock(block.attn.qkv.in_features, (attention,), (mlp,)))


def _around(block: nn.Module, index: int) -> dict[str, object]:
    """What is around the first or the second branch."""
    norm, drop_path = f"norm{index}", f"drop_path{index}"
    around = {"drop_path": parts.drop_path(getattr(block, drop_path), f"block.{drop_path}")}
    normalise = parts.norm(getattr(block, norm), f"block.{norm}")
    if hasattr(block, "ls1"):
        post = parts.layer_scale(getattr(block, f"ls{index}"), f"block.ls{index}")
        return {**around, "norm": normalise, "post": post}
    return {**around, "post": normalise}


def _score_bias(bias: nn.Module, window: int) -> RelativePositionBias:
    """The bias inside a window, as a table: what it is computed from depends on the whole grid."""
    checks.require_exactly(bias, "rel_pos", (layers.RelPosBias, layers.RelPosMlp))
    with torch.no_grad():
        scores = clone_module(bias).eval().get_bias()[0]  # RelPosMlp has dropout
    return RelativePositionBias.from_grid(scores, bias.window_size, window)
