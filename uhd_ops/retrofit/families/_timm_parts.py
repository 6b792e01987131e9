# SPDX-License-Identifier: Apache-2.0
"""The parts that timm's blocks are made of: attention, MLPs, norms, LayerScale, drop path."""

from __future__ import annotations

import functools

import torch
from timm import layers
from timm.layers import activations
from timm.models import vision_transformer, vitamin
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.modules import LinearView, ScaleView

# Older versions of timm have no differential attention.
DiffAttention = getattr(layers, "DiffAttention", None)
_ATTENTIONS = (layers.Attention, DiffAttention) if DiffAttention else (layers.Attention,)
_MLPS = (layers.Mlp, layers.GluMlp, layers.SwiGLU)


def vit_attention(
    module: nn.Module, name: str, **branch: object
) -> AttentionSpec | OwnAttentionSpec:
    """Read ``Attention`` or ``DiffAttention``.

    Args:
        module: The attention.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec.
    """
    if type(module) is layers.Attention:
        return attention(module, name, **branch)
    modules.require_exactly(module, name, _ATTENTIONS)
    modules.require_own_forward(module, name)
    check_scale(module, name)
    for part in ("q_norm", "k_norm", "norm", "sub_norm"):
        norm(getattr(module, part), f"{name}.{part}")
    for part in ("attn_drop", "proj_drop"):
        modules.dropout(getattr(module, part), f"{name}.{part}")
    return OwnAttentionSpec(module, **branch)


def vit_mlp(module: nn.Module, name: str, **branch: object) -> MlpSpec:
    """Read ``Mlp``, ``GluMlp``, ``SwiGLU``, or ViTamin's ``GeGluMlp``.

    Args:
        module: The MLP.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of MlpSpec.
    """
    if type(module) in _MLPS:
        return mlp(module, name, **branch)
    modules.require_exactly(module, name, (*_MLPS, vitamin.GeGluMlp))
    modules.require_own_forward(module, name)
    return MlpSpec(
        module.w1,
        module.w2,
        activation(module.act, f"{name}.act"),
        gate=module.w0,
        patch_norm=norm(module.norm, f"{name}.norm"),
        hidden_dropout=modules.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=modules.dropout(module.drop2, f"{name}.drop2"),
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


# A norm over the last dimension; None for an Identity.
norm = functools.partial(modules.optional, classes=NORMS)


def layer_scale(module: nn.Module, name: str) -> ScaleView | None:
    """Return the factors of a LayerScale; None for an Identity."""
    scale = modules.optional(module, name, (vision_transformer.LayerScale,))
    return None if scale is None else ScaleView(scale, "gamma", calls=True)


def factors(block: nn.Module, name: str) -> ScaleView | None:
    """Return the LayerScale factors that a block holds itself; None where it has none."""
    return None if getattr(block, name) is None else ScaleView(block, name, calls=False)


def drop_path(module: nn.Module, name: str) -> float:
    """Return the probability of a DropPath, 0 for an Identity."""
    modules.require_exactly(module, name, (layers.DropPath, nn.Identity))
    if not getattr(module, "scale_by_keep", True):
        raise NotImplementedError(f"{name} must have scale_by_keep=True, got False")
    return float(getattr(module, "drop_prob", 0.0) or 0.0)


def around(
    block: nn.Module, branch: int, scale: str = "", *, post_norm: bool = False
) -> dict[str, object]:
    """Read what is around one of the two branches of a block, for AttentionSpec and MlpSpec.

    Args:
        block: It has ``norm<branch>`` and ``drop_path<branch>``.
        branch: 1 for the attention, 2 for the MLP.
        scale: What the name of the LayerScale begins with, ``"ls"`` for modules and ``"gamma_"``
            for parameters; empty where there is none.
        post_norm: Whether the norm follows the branch.
    """
    normalise = norm(getattr(block, f"norm{branch}"), f"block.norm{branch}")
    path = drop_path(getattr(block, f"drop_path{branch}"), f"block.drop_path{branch}")
    if post_norm:
        return {"post": normalise, "drop_path": path}
    if scale == "ls":
        post = layer_scale(getattr(block, f"ls{branch}"), f"block.ls{branch}")
    else:
        post = factors(block, f"{scale}{branch}") if scale else None
    return {"norm": normalise, "post": post, "drop_path": path}


def activation(module: nn.Module, name: str) -> str:
    """Return the operators' name of an activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    modules.require_exactly(module, name, (nn.GELU, *ACTIVATIONS))
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
    modules.require_exactly(module, name, classes)
    modules.require_own_forward(module, name)
    check_scale(module, name)
    return AttentionSpec(
        module.num_heads,
        projections or (module.qkv,),
        module.proj,
        module.head_dim,
        q_norm=norm(module.q_norm, f"{name}.q_norm"),
        k_norm=norm(module.k_norm, f"{name}.k_norm"),
        inner_norm=norm(getattr(module, "norm", None), f"{name}.norm"),
        gate=modules.optional(getattr(module, "gate", None), f"{name}.gate", (nn.Linear,)),
        attention_dropout=modules.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=modules.dropout(module.proj_drop, f"{name}.proj_drop"),
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
    modules.require_exactly(module, name, _MLPS)
    modules.require_own_forward(module, name)
    if type(module) is layers.SwiGLU:
        gate, fc1 = module.fc1_g, module.fc1_x
    elif type(module) is layers.GluMlp:
        halves = _halves(module.fc1)
        gate, fc1 = reversed(halves) if module.gate_last else halves
    else:
        gate, fc1 = None, module.fc1
    return MlpSpec(
        fc1,
        module.fc2,
        activation(module.act, f"{name}.act"),
        gate=gate,
        inner_norm=norm(module.norm, f"{name}.norm"),
        hidden_dropout=modules.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=modules.dropout(module.drop2, f"{name}.drop2"),
        **branch,
    )


def biased(module: nn.Module) -> LinearView:
    """Return the fused projection of an attention that holds the biases of its thirds."""
    return LinearView(
        module.qkv,
        bias=lambda: torch.cat([module.q_bias, module.k_bias, module.v_bias]),
        calls=module.qkv_bias_separate,
    )


def _halves(packed: nn.Module) -> list[nn.Module]:
    """Split a linear layer whose rows are two layers, one after the other.

    The block-diagonal form must be made of each of them: the blocks of the packed weight would make
    some patches the gates of others.
    """
    rows = packed.out_features // 2
    return [LinearView(packed, (0, rows)), LinearView(packed, (rows, 2 * rows))]


def resize_table(
    table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], extra: int
) -> torch.Tensor:
    """Resize a table of offsets ``(offsets + extra, H)`` as timm's ``set_window_size`` does."""
    if tuple(old) == new:
        return table
    offsets = (2 * new[0] - 1) * (2 * new[1] - 1)
    return layers.resize_rel_pos_bias_table(
        table,
        new_window_size=new,
        new_bias_shape=(offsets + extra, table.shape[1]),
        old_window_size=tuple(old),
    )
