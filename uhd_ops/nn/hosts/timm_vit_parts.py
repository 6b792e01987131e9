# SPDX-License-Identifier: Apache-2.0
"""The attentions and MLPs that the blocks of timm's ``VisionTransformer`` may hold."""

from __future__ import annotations

import torch
from timm import layers
from timm.models import vitamin
from torch import nn

from uhd_ops.nn.host_block import HostAttention, HostMlp, HostOwnAttention
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_parts as parts

# Older versions of timm have no differential attention.
DiffAttention = getattr(layers, "DiffAttention", None)
_ATTENTIONS = tuple(cls for cls in (layers.Attention, DiffAttention) if cls)
_MLPS = (layers.Mlp, layers.GluMlp, layers.SwiGLU, vitamin.GeGluMlp)


def attention(module: nn.Module, name: str, **branch: object) -> HostAttention | HostOwnAttention:
    """Read ``Attention`` or ``DiffAttention``.

    Args:
        module: The attention.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of HostAttention.
    """
    checks.require_exactly(module, name, _ATTENTIONS)
    if type(module) is layers.Attention:
        return parts.attention(module, name, **branch)
    checks.require_own_forward(module, name)
    parts.check_scale(module, name)
    for part in ("qkv", "proj"):
        checks.linear(getattr(module, part), f"{name}.{part}")
    for part in ("q_norm", "k_norm", "norm", "sub_norm"):
        parts.norm(getattr(module, part), f"{name}.{part}")
    for part in ("attn_drop", "proj_drop"):
        checks.dropout(getattr(module, part), f"{name}.{part}")
    return HostOwnAttention(module, _run, **branch)


def _run(
    module: nn.Module, windows: torch.Tensor, shape: tuple[int, int], view_tokens: torch.Tensor
) -> torch.Tensor:
    """Run an attention module that depends on nothing but the tokens of a window."""
    return module(windows)


def mlp(module: nn.Module, name: str, **branch: object) -> HostMlp:
    """Read ``Mlp``, ``GluMlp``, ``SwiGLU``, or ViTamin's ``GeGluMlp``.

    Args:
        module: The MLP.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of HostMlp.
    """
    checks.require_exactly(module, name, _MLPS)
    if type(module) is not vitamin.GeGluMlp:
        return parts.mlp(module, name, **branch)
    checks.require_own_forward(module, name)
    return HostMlp(
        checks.linear(module.w1, f"{name}.w1"),
        checks.linear(module.w2, f"{name}.w2"),
        parts.activation(module.act, f"{name}.act"),
        gate=checks.linear(module.w0, f"{name}.w0"),
        patch_norm=parts.norm(module.norm, f"{name}.norm"),
        hidden_dropout=checks.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=checks.dropout(module.drop2, f"{name}.drop2"),
        **branch,
    )
