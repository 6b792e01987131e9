# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``Beit``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models import beit
from torch import nn

from uhd_ops.nn.host_block import HostAttention, HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.layers import linear_of
from uhd_ops.nn.score_bias import RelativePositionBias

_TENSORS = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index")


def read(block: nn.Module, shared_bias: nn.Module | None = None) -> HostBlock:
    """Return the parts of a ``Block``: pre-norm, with relative positions.

    Args:
        block: The block.
        shared_bias: The model's ``rel_pos_bias``, which adds to the block's own.
    """
    checks.require_own_forward(block, "block")
    attention = _attention(
        block.attn,
        shared_bias,
        norm=parts.norm(block.norm1, "block.norm1"),
        post=block.gamma_1,
        drop_path=parts.drop_path(block.drop_path1, "block.drop_path1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "block.mlp",
        norm=parts.norm(block.norm2, "block.norm2"),
        post=block.gamma_2,
        drop_path=parts.drop_path(block.drop_path2, "block.drop_path2"),
    )
    return checks.check_shapes(HostBlock(block.attn.qkv.in_features, (attention,), (mlp,)))


def _attention(module: nn.Module, shared_bias: nn.Module | None, **branch: object) -> HostAttention:
    name = "block.attn"
    checks.require_exactly(module, name, (beit.Attention,))
    checks.require_plain(module, name, _TENSORS)
    weight, bias = checks.linear(module.qkv, f"{name}.qkv").weight, None
    if module.q_bias is not None:
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
    head_dim = weight.shape[0] // (3 * module.num_heads)
    parts.check_scale(module, name, head_dim)
    return HostAttention(
        module.num_heads,
        (linear_of(weight, bias),),
        checks.linear(module.proj, f"{name}.proj"),
        head_dim,
        score_bias=_score_bias(module, shared_bias),
        attention_dropout=checks.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=checks.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def _score_bias(
    module: nn.Module, shared_bias: nn.Module | None
) -> Callable[[int], RelativePositionBias] | None:
    """Make the sum of both biases, each of which may be missing."""
    sources = []
    if module.relative_position_bias_table is not None:
        sources.append((module._get_rel_pos_bias, module.window_size))
    if shared_bias is not None:
        checks.require_exactly(shared_bias, "vit.rel_pos_bias", (beit.RelativePositionBias,))
        sources.append((shared_bias, shared_bias.window_size))
    if not sources:
        return None

    def make(window: int) -> RelativePositionBias:
        total = sum(source() for source, _ in sources)
        return RelativePositionBias.from_grid(total.view(-1, *total.shape[-2:]), grid, window)

    _, grid = sources[0]
    return make
