# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``Eva``, which ``Qwen3VitEncoder`` and ``NaFlexVit`` use too."""

from __future__ import annotations

import torch
from timm import layers
from timm.models.eva import EvaAttention, EvaBlockPostNorm
from torch import nn

from uhd_ops.nn.host_block import HostAttention, HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import body_class
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.layers import linear_of


def read(block: nn.Module) -> HostBlock:
    """Return the parts of an ``EvaBlock``, pre-norm, or of an ``EvaBlockPostNorm``."""
    checks.require_own_forward(block, "block")
    norms = [parts.norm(getattr(block, name), f"block.{name}") for name in ("norm1", "norm2")]
    if body_class(block) is EvaBlockPostNorm:
        around = [{"post": norm} for norm in norms]
    else:
        # Sapiens2 scales the attention only.
        scales = block.gamma_1, block.gamma_2
        around = [{"norm": n, "post": s} for n, s in zip(norms, scales, strict=True)]
    for index, branch in enumerate(around, 1):
        name = f"drop_path{index}"
        branch["drop_path"] = parts.drop_path(getattr(block, name), f"block.{name}")
    host = attention(block.attn, "block.attn", **around[0])
    mlp = parts.mlp(block.mlp, "block.mlp", **around[1])
    return checks.check_shapes(HostBlock(host.proj.out_features, (host,), (mlp,)))


def attention(module: nn.Module, name: str, **branch: object) -> HostAttention:
    """Read timm's attention with rotary embeddings, ``AttentionRope`` or ``EvaAttention``.

    Args:
        module: The attention.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of HostAttention.
    """
    classes = layers.AttentionRope, EvaAttention
    checks.require_exactly(module, name, classes)
    return parts.attention(
        module,
        name,
        classes,
        _projections(module, name),
        num_kv_heads=getattr(module, "num_kv_heads", None),
        rotate_half=module.rotate_half,
        **branch,
    )


def _projections(module: nn.Module, name: str) -> tuple[nn.Linear, ...]:
    if module.qkv is None:
        names = ("q_proj", "k_proj", "v_proj")
        return tuple(checks.linear(getattr(module, part), f"{name}.{part}") for part in names)
    fused = checks.linear(module.qkv, f"{name}.qkv")
    if getattr(module, "q_bias", None) is None:
        return (fused,)
    # The bias of the keys, a buffer of zeros that no checkpoint holds, becomes trainable.
    bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
    return (linear_of(fused.weight, bias),)
