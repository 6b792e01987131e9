# SPDX-License-Identifier: Apache-2.0
"""The blocks of timm's ``Gemma4VitEncoder``."""

from __future__ import annotations

from timm.models import gemma4_vit
from torch import nn

from uhd_ops.nn.host_block import HostAttention, HostBlock, HostMlp
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import timm_parts as parts
from uhd_ops.nn.layers import Limits

_LIMITS = ("input_min", "input_max", "output_min", "output_max")


def read(block: nn.Module) -> HostBlock:
    """Return the parts of a ``Gemma4Block``: a norm in front of each branch and one behind it."""
    checks.require_own_forward(block, "block")
    drop_path = parts.drop_path(block.drop_path, "block.drop_path")
    attention = _attention(
        block.attn,
        norm=parts.norm(block.norm1, "block.norm1"),
        post=parts.norm(block.norm2, "block.norm2"),
        drop_path=drop_path,
    )
    mlp = _mlp(
        block.mlp,
        norm=parts.norm(block.norm3, "block.norm3"),
        post=parts.norm(block.norm4, "block.norm4"),
        drop_path=drop_path,
    )
    dim = block.attn.q_proj.linear.in_features
    return checks.check_shapes(HostBlock(dim, (attention,), (mlp,)))


def _attention(module: nn.Module, **branch: object) -> HostAttention:
    name = "block.attn"
    checks.require_exactly(module, name, (gemma4_vit.Gemma4Attention,))
    checks.require_own_forward(module, name)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _linear(getattr(module, projection), f"{name}.{projection}")
    return HostAttention(
        module.num_heads,
        (module.q_proj, module.k_proj, module.v_proj),
        module.o_proj,
        module.head_dim,
        num_kv_heads=module.num_kv_heads,
        scale=1.0,
        q_norm=parts.norm(module.q_norm, f"{name}.q_norm"),
        k_norm=parts.norm(module.k_norm, f"{name}.k_norm"),
        v_norm=parts.norm(module.v_norm, f"{name}.v_norm"),
        rotate_half=2,  # the first half of a head turns with the column, the second with the row
        attention_dropout=checks.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=checks.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def _mlp(module: nn.Module, **branch: object) -> HostMlp:
    name = "block.mlp"
    checks.require_exactly(module, name, (gemma4_vit.Gemma4GatedMlp,))
    checks.require_own_forward(module, name)
    limits = {
        "fc1": _limits(module.up_proj),
        "gate": _limits(module.gate_proj),
        "fc2": _limits(module.down_proj),
    }
    return HostMlp(
        _linear(module.up_proj, f"{name}.up_proj"),
        _linear(module.down_proj, f"{name}.down_proj"),
        gate=_linear(module.gate_proj, f"{name}.gate_proj"),
        activation=parts.activation(module.act, f"{name}.act"),
        limits={part: found for part, found in limits.items() if found is not None},
        output_dropout=checks.dropout(module.drop, f"{name}.drop"),
        **branch,
    )


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """Return the layer inside a ``Gemma4ClippableLinear``."""
    checks.require_exactly(module, name, (gemma4_vit.Gemma4ClippableLinear,))
    checks.require_plain(module, name, _LIMITS)
    return checks.linear(module.linear, f"{name}.linear")


def _limits(module: nn.Module) -> Limits | None:
    """Return the limits of a ``Gemma4ClippableLinear``, or None where it has none."""
    if not all(limit in module._buffers for limit in _LIMITS):
        return None
    return Limits(*(module._buffers[limit] for limit in _LIMITS), enabled=module.use_clipped)
