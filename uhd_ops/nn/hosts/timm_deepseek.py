# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``DeepseekVitEncoder``."""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_eva
from uhd_ops.nn.hosts import timm_parts as parts


def read(block: nn.Module) -> HostBlock:
    """Return the parts of a ``DeepseekVitBlock``: pre-norm, without LayerScale."""
    checks.require_own_forward(block, "block")
    attention = timm_eva.attention(
        block.attn,
        "block.attn",
        norm=parts.norm(block.norm1, "block.norm1"),
        drop_path=parts.drop_path(block.drop_path1, "block.drop_path1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "block.mlp",
        norm=parts.norm(block.norm2, "block.norm2"),
        drop_path=parts.drop_path(block.drop_path2, "block.drop_path2"),
    )
    return checks.check_shapes(HostBlock(attention.proj.out_features, (attention,), (mlp,)))
