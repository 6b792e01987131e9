# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``VisionTransformer`` that run attention and MLP one after the other."""

from __future__ import annotations

from timm.models.vision_transformer import ResPostBlock
from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import body_class
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.hosts import timm_vit_parts as vit_parts


def read(block: nn.Module) -> HostBlock:
    """Return the parts of a ``Block``, which is pre-norm, or a ``ResPostBlock``."""
    checks.require_own_forward(block, "block")
    around = _post_norm if body_class(block) is ResPostBlock else _pre_norm
    attention = vit_parts.attention(block.attn, "block.attn", **around(block, 1))
    mlp = vit_parts.mlp(block.mlp, "block.mlp", **around(block, 2))
    dim = block.attn.qkv.in_features
    return checks.check_shapes(HostBlock(dim, (attention,), (mlp,)))


def _pre_norm(block: nn.Module, branch: int) -> dict[str, object]:
    return {
        "norm": _norm(block, branch),
        "post": parts.layer_scale(getattr(block, f"ls{branch}"), f"block.ls{branch}"),
        "drop_path": _drop_path(block, branch),
    }


def _post_norm(block: nn.Module, branch: int) -> dict[str, object]:
    return {"post": _norm(block, branch), "drop_path": _drop_path(block, branch)}


def _norm(block: nn.Module, branch: int) -> nn.Module | None:
    return parts.norm(getattr(block, f"norm{branch}"), f"block.norm{branch}")


def _drop_path(block: nn.Module, branch: int) -> float:
    return parts.drop_path(getattr(block, f"drop_path{branch}"), f"block.drop_path{branch}")
