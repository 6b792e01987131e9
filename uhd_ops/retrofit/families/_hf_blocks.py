# SPDX-License-Identifier: Apache-2.0
"""The parts that the vision layers of Hugging Face transformers are made of.

Each model of transformers has its own copies of these classes. They are looked up in the module
that defines the layer, so that no other model is imported.
"""

from __future__ import annotations

import sys

from torch import nn
from transformers import activations

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, MlpSpec
from uhd_ops.nn.modules import ScaleView

_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


def sibling(cls: type, *names: str) -> type:
    """Return the class of the module that defines ``cls`` with the first of the names it has."""
    module = sys.modules[cls.__module__]
    return getattr(module, next((name for name in names if hasattr(module, name)), names[0]))


def norm(module: nn.Module, name: str, *classes: type) -> nn.Module:
    """Return a norm of one of the classes, by default a LayerNorm."""
    modules.require_exactly(module, name, classes or (nn.LayerNorm,))
    return module


def layer_scale(module: nn.Module, name: str, cls: type) -> ScaleView:
    """Return the factors of a LayerScale."""
    modules.require_exactly(module, name, (cls,))
    return ScaleView(module, "lambda1", calls=True)


def drop_path(module: nn.Module, name: str, cls: type) -> float:
    """Return the probability of a DropPath, 0 for an Identity."""
    modules.require_exactly(module, name, (cls, nn.Identity))
    return float(getattr(module, "drop_prob", 0.0))


def attention(module: nn.Module, name: str, cls: type, **branch: object) -> AttentionSpec:
    """Read an attention with ``qkv``, or with ``q_proj``, ``k_proj`` and ``v_proj``.

    Args:
        module: The attention.
        name: What to call it in messages.
        cls: The class that it must have.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec; and what
            else it has, such as ``rotate_half``.
    """
    modules.require_exactly(module, name, (cls,))
    modules.require_own_forward(module, name)
    projections = ["qkv"] if hasattr(module, "qkv") else [f"{part}_proj" for part in "qkv"]
    names = ("o_proj", "out_proj", "proj", "projection", "projection_layer")
    out = next(part for part in names if hasattr(module, part))
    rate = module.dropout if hasattr(module, "dropout") else module.attention_dropout
    if isinstance(rate, nn.Module):
        rate = modules.dropout(rate, f"{name}.dropout")
    heads = "num_heads" if hasattr(module, "num_heads") else "num_attention_heads"
    for part in ("q_norm", "k_norm"):
        if hasattr(module, part) and part not in branch:
            modules.require_exactly(getattr(module, part), f"{name}.{part}", (nn.Identity,))
    proj_dropout = getattr(module, "projection_dropout", nn.Identity())
    return AttentionSpec(
        getattr(module, heads),
        tuple(getattr(module, part) for part in projections),
        getattr(module, out),
        module.head_dim,
        scale=float(module.scale if hasattr(module, "scale") else module.scaling),
        attention_dropout=float(rate),
        proj_dropout=modules.dropout(proj_dropout, f"{name}.projection_dropout"),
        **branch,
    )


def mlp(module: nn.Module, name: str, classes: tuple[type, ...], **branch: object) -> MlpSpec:
    """Read an MLP of two layers, or of ``up_proj`` and ``down_proj`` with or without gate.

    Args:
        module: The MLP.
        name: What to call it in messages.
        classes: The classes that it may have.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of MlpSpec; and what else it
            has.
    """
    modules.require_exactly(module, name, classes)
    modules.require_own_forward(module, name)
    layers = ("fc1", "fc2"), ("linear_fc1", "linear_fc2"), ("up_proj", "down_proj")
    first, second = next(pair for pair in layers if hasattr(module, pair[0]))
    act = next(part for part in ("act_fn", "activation_fn", "act") if hasattr(module, part))
    gate = getattr(module, "gate_proj", None)
    if hasattr(module, "dropout1"):
        branch["hidden_dropout"] = modules.dropout(module.dropout1, f"{name}.dropout1")
        branch["output_dropout"] = modules.dropout(module.dropout2, f"{name}.dropout2")
    return MlpSpec(
        getattr(module, first),
        getattr(module, second),
        activation(getattr(module, act), f"{name}.{act}"),
        gate=gate,
        **branch,
    )


def activation(module: nn.Module, name: str) -> str:
    """Return the operators' name of an activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    modules.require_exactly(module, name, tuple(_ACTIVATIONS))
    modules.require_own_forward(module, name)
    return _ACTIVATIONS[type(module)]
