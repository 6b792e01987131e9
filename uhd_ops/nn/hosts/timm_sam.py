# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``VisionTransformerSAM``."""

from __future__ import annotations

import functools

from timm.models import vision_transformer_sam
from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.score_bias import DecomposedPositionBias


def read(block: nn.Module) -> HostBlock:
    """Return the parts of a ``Block``: pre-norm, with vectors for relative positions.

    The windows that the block itself may attend in say nothing about those of the compressor.
    """
    checks.require_own_forward(block, "block")
    if block.attn.rope is not None:
        raise NotImplementedError(
            "block.attn.rope must be None: rotary embeddings of a VisionTransformerSAM are for one "
            "grid, and are not supported"
        )
    attention = parts.attention(
        block.attn,
        "block.attn",
        (vision_transformer_sam.Attention,),
        norm=parts.norm(block.norm1, "block.norm1"),
        score_bias=_score_bias(block.attn),
        post=parts.layer_scale(block.ls1, "block.ls1"),
        drop_path=parts.drop_path(block.drop_path1, "block.drop_path1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "block.mlp",
        norm=parts.norm(block.norm2, "block.norm2"),
        post=parts.layer_scale(block.ls2, "block.ls2"),
        drop_path=parts.drop_path(block.drop_path2, "block.drop_path2"),
    )
    return checks.check_shapes(HostBlock(block.attn.qkv.in_features, (attention,), (mlp,)))


def _score_bias(module: nn.Module) -> functools.partial | None:
    if not module.use_rel_pos:
        return None
    checks.require_plain(module, "block.attn", ("rel_pos_h", "rel_pos_w"))
    return functools.partial(DecomposedPositionBias.from_grid, module.rel_pos_h, module.rel_pos_w)
