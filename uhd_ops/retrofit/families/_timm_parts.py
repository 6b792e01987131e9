# SPDX-License-Identifier: Apache-2.0
"""The parts that timm's blocks are made of: attention, MLPs, norms, LayerScale, drop path."""

from __future__ import annotations

import torch
from timm import layers
from timm.layers import activations
from timm.models import vision_transformer, vitamin
from torch import nn

from uhd_ops.nn.block_spec import AttentionSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.layers import linear_of
from uhd_ops.retrofit import checks

# Older versions of timm have no differential attention.
DiffAttention = getattr(layers, "DiffAttention", None)
_ATTENTIONS = tuple(cls for cls in (layers.Attention, DiffAttention) if cls)
_MLPS = (layers.Mlp, layers.GluMlp, layers.SwiGLU, vitamin.GeGluMlp)


def vit_attention(
    module: nn.Module, name: str, **branch: object
) -> AttentionSpec | OwnAttentionSpec:
    """Read ``Attention`` or ``DiffAttention``.

    Args:
        module: The attention.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec.
    """
    checks.require_exactly(module, name, _ATTENTIONS)
    if type(module) is layers.Attention:
        return attention(module, name, **branch)
    checks.require_own_forward(module, name)
    check_scale(module, name)
    for part in ("qkv", "proj"):
        checks.linear(getattr(module, part), f"{name}.{part}")
    for part in ("q_norm", "k_norm", "norm", "sub_norm"):
        norm(getattr(module, part), f"{name}.{part}")
    for part in ("attn_drop", "proj_drop"):
        checks.dropout(getattr(module, part), f"{name}.{part}")
    return OwnAttentionSpec(module, _run, **branch)


def _run(
    module: nn.Module, windows: torch.Tensor, shape: tuple[int, int], view_tokens: torch.Tensor
) -> torch.Tensor:
    """Run an attention module that depends on nothing but the tokens of a window."""
    return module(windows)


def vit_mlp(module: nn.Module, name: str, **branch: object) -> MlpSpec:
    """Read ``Mlp``, ``GluMlp``, ``SwiGLU``, or ViTamin's ``GeGluMlp``.

    Args:
        module: The MLP.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of MlpSpec.
    """
    checks.require_exactly(module, name, _MLPS)
    if type(module) is not vitamin.GeGluMlp:
        return mlp(module, name, **branch)
    checks.require_own_forward(module, name)
    return MlpSpec(
        checks.linear(module.w1, f"{name}.w1"),
        checks.linear(module.w2, f"{name}.w2"),
        activation(module.act, f"{name}.act"),
        gate=checks.linear(module.w0, f"{name}.w0"),
        patch_norm=norm(module.norm, f"{name}.norm"),
        hidden_dropout=checks.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=checks.dropout(module.drop2, f"{name}.drop2"),
        **branch,
    )


LAYER_NORMS = (nn.LayerNorm, layers.LayerNorm, layers.LayerNormFp32)
NORMS = (*LAYER_NORMS, layers.RmsNorm, layers.RmsNormFp32)
ACTIVATIONS = {
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


def norm(module: nn.Module, name: str) -> nn.Module | None:
    """Return a norm over the last dimension; None for an Identity."""
    return checks.optional(module, name, NORMS)


def layer_scale(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return the factors of a LayerScale; None for an Identity."""
    checks.require_exactly(module, name, (vision_transformer.LayerScale, nn.Identity))
    return getattr(module, "gamma", None)


def drop_path(module: nn.Module, name: str) -> float:
    """Return the probability of a DropPath, 0 for an Identity."""
    checks.require_exactly(module, name, (layers.DropPath, nn.Identity))
    if not getattr(module, "scale_by_keep", True):
        raise NotImplementedError(f"{name} must have scale_by_keep=True, got False")
    return float(getattr(module, "drop_prob", 0.0) or 0.0)


def activation(module: nn.Module, name: str) -> str:
    """Return the operators' name of an activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    checks.require_exactly(module, name, (nn.GELU, *ACTIVATIONS))
    return ACTIVATIONS[type(module)]


def attention(
    module: nn.Module,
    name: str,
    classes: tuple[type, ...] = (layers.Attention,),
    projections: tuple[nn.Module, ...] | None = None,
    **branch: object,
) -> AttentionSpec:
    """Read timm's ``Attention``, or one that differs by what is added to the scores.

    Args:
        module: The attention.
        name: What to call it in messages.
        classes: Its class is one of these.
        projections: As for AttentionSpec; None means ``module.qkv``.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec.
    """
    checks.require_exactly(module, name, classes)
    checks.require_own_forward(module, name)
    check_scale(module, name)
    return AttentionSpec(
        module.num_heads,
        projections or (checks.linear(module.qkv, f"{name}.qkv"),),
        checks.linear(module.proj, f"{name}.proj"),
        module.head_dim,
        q_norm=norm(module.q_norm, f"{name}.q_norm"),
        k_norm=norm(module.k_norm, f"{name}.k_norm"),
        inner_norm=norm(getattr(module, "norm", None), f"{name}.norm"),
        gate=checks.optional(getattr(module, "gate", None), f"{name}.gate", (nn.Linear,)),
        attention_dropout=checks.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=checks.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def check_scale(module: nn.Module, name: str, head_dim: int | None = None) -> None:
    """Refuse a factor on the scores other than ``head_dim ** -0.5``, of the module or as given."""
    expected = (head_dim or module.head_dim) ** -0.5
    if abs(module.scale - expected) > 1e-6 * expected:
        raise NotImplementedError(
            f"{name}.scale must be head_dim ** -0.5 = {expected}, got {module.scale}"
        )


def mlp(module: nn.Module, name: str, **branch: object) -> MlpSpec:
    """Read one of timm's MLPs: ``Mlp``, ``GluMlp`` and ``SwiGLU``.

    Args:
        module: The MLP.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of MlpSpec.
    """
    checks.require_exactly(module, name, (layers.Mlp, layers.GluMlp, layers.SwiGLU))
    checks.require_own_forward(module, name)
    gate = None
    if type(module) is layers.SwiGLU:
        gate = checks.linear(module.fc1_g, f"{name}.fc1_g")
        fc1 = checks.linear(module.fc1_x, f"{name}.fc1_x")
    else:
        fc1 = checks.linear(module.fc1, f"{name}.fc1")
    if type(module) is layers.GluMlp:
        gate, fc1 = _halves(fc1)
        if module.gate_last:
            gate, fc1 = fc1, gate
    return MlpSpec(
        fc1,
        checks.linear(module.fc2, f"{name}.fc2"),
        activation(module.act, f"{name}.act"),
        gate=gate,
        inner_norm=norm(module.norm, f"{name}.norm"),
        hidden_dropout=checks.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=checks.dropout(module.drop2, f"{name}.drop2"),
        **branch,
    )


def _halves(packed: nn.Linear) -> list[nn.Linear]:
    """Split a Linear whose rows are two layers, one after the other.

    The block-diagonal form must be made of each of them: the blocks of the packed weight would make
    some patches the gates of others.
    """
    biases = (None, None) if packed.bias is None else packed.bias.chunk(2)
    return [
        linear_of(weight, bias) for weight, bias in zip(packed.weight.chunk(2), biases, strict=True)
    ]
