# SPDX-License-Identifier: Apache-2.0
"""Read timm's ``vision_transformer.Block``, or refuse it before anything is changed."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.mlp_forms import MlpWeights

# The parts of a block that hold the weights to reuse.
_WITH_WEIGHTS = (
    "norm1",
    "attn.qkv",
    "attn.q_norm",
    "attn.k_norm",
    "attn.proj",
    "norm2",
    "mlp.fc1",
    "mlp.fc2",
)


def import_timm_vision_transformer():
    """Return the module ``timm.models.vision_transformer``, or say which extra installs it."""
    try:
        from timm.models import vision_transformer
    except ImportError as error:
        raise ImportError(
            "retrofitting a timm model needs timm: pip install uhd_ops[timm]"
        ) from error
    return vision_transformer


def read_timm_block(block: nn.Module) -> HostBlock:
    """Return the parts of a timm Block; NotImplementedError for whatever is not understood."""
    timm = import_timm_vision_transformer()
    from timm import layers

    # A compressed block names the class whose body it still runs.
    cls = getattr(type(block), "body_class", type(block))
    if cls is not timm.Block:
        raise NotImplementedError(f"block must be timm's Block, got {cls.__name__}")
    for name in ("", "attn", "mlp"):
        _require_own_forward(block.get_submodule(name), f"block.{name}".rstrip("."))
    attention, mlp = block.attn, block.mlp
    _require_exactly(attention, "block.attn", (timm.Attention,))
    _require_exactly(mlp, "block.mlp", (timm.Mlp,))
    for owner, name in ((attention, "attn.norm"), (attention, "attn.gate"), (mlp, "mlp.norm")):
        part = getattr(owner, name.partition(".")[2], None)
        if part is not None:
            _require_exactly(part, f"block.{name}", (nn.Identity,))
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        _require_exactly(block.get_submodule(name), f"block.{name}", (nn.Linear,))
    layer_norms = (nn.LayerNorm, layers.LayerNorm, layers.LayerNormFp32)
    norms = (*layer_norms, layers.RmsNorm)
    _require_exactly(block.norm1, "block.norm1", norms)
    _require_exactly(block.norm2, "block.norm2", layer_norms)
    for name in _WITH_WEIGHTS:
        _require_plain(block.get_submodule(name), f"block.{name}")
    host = HostBlock(
        num_heads=attention.num_heads,
        norm1=block.norm1,
        qkv=attention.qkv,
        q_norm=_head_norm(attention.q_norm, "block.attn.q_norm", norms),
        k_norm=_head_norm(attention.k_norm, "block.attn.k_norm", norms),
        proj=attention.proj,
        layer_scale1=_layer_scale(block.ls1, "block.ls1", timm),
        norm2=block.norm2,
        mlp=MlpWeights(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
        activation=_activation(mlp.act),
        layer_scale2=_layer_scale(block.ls2, "block.ls2", timm),
        attention_dropout=_dropout(attention.attn_drop, "block.attn.attn_drop"),
        proj_dropout=_dropout(attention.proj_drop, "block.attn.proj_drop"),
        hidden_dropout=_dropout(mlp.drop1, "block.mlp.drop1"),
        output_dropout=_dropout(mlp.drop2, "block.mlp.drop2"),
        drop_path1=_drop_path(block.drop_path1, "block.drop_path1", timm),
        drop_path2=_drop_path(block.drop_path2, "block.drop_path2", timm),
    )
    _check_shapes(host, attention.scale)
    return host


def _require_exactly(module: nn.Module, name: str, classes: tuple[type, ...]) -> None:
    # A subclass may compute something else (a quantised or low-rank adapted Linear, say).
    if type(module) not in classes:
        known = " or ".join(dict.fromkeys(cls.__name__ for cls in classes))
        raise NotImplementedError(f"{name} must be {known}, got {type(module).__name__}")


def _require_own_forward(module: nn.Module, name: str) -> None:
    # A forward set on the instance hides that of the class, which is the one understood.
    if "forward" in vars(module):
        raise NotImplementedError(f"{name} must have the forward of its class, got one of its own")


def _require_plain(module: nn.Module, name: str) -> None:
    _require_own_forward(module, name)
    # torch.nn.utils.prune, weight_norm and spectral_norm keep the class, but compute the weight
    # from other parameters in a hook, which a copy would leave behind.
    other = (module._parameters.keys() | module._buffers.keys()) - {"weight", "bias"}
    if other:
        raise NotImplementedError(
            f"{name} must hold its weight as a plain parameter, got {', '.join(sorted(other))}"
        )


def _head_norm(norm: nn.Module, name: str, classes: tuple[type, ...]) -> nn.Module | None:
    if isinstance(norm, nn.Identity):
        return None
    _require_exactly(norm, name, classes)
    return norm


def _layer_scale(module: nn.Module, name: str, timm) -> torch.Tensor | None:
    _require_exactly(module, name, (timm.LayerScale, nn.Identity))
    return getattr(module, "gamma", None)


def _dropout(module: nn.Module, name: str) -> float:
    _require_exactly(module, name, (nn.Dropout, nn.Identity))
    return getattr(module, "p", 0.0)


def _drop_path(module: nn.Module, name: str, timm) -> float:
    _require_exactly(module, name, (timm.DropPath, nn.Identity))
    if not getattr(module, "scale_by_keep", True):
        raise NotImplementedError(f"{name} must have scale_by_keep=True, got False")
    return float(getattr(module, "drop_prob", 0.0) or 0.0)


def _activation(module: nn.Module) -> str:
    from timm.layers import activations

    names = {
        activations.GELU: "gelu",
        activations.GELUTanh: "gelu_tanh",
        activations.QuickGELU: "quick_gelu",
        nn.SiLU: "silu",
        nn.ReLU: "relu",
    }
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    _require_exactly(module, "block.mlp.act", (nn.GELU, *names))
    return names[type(module)]


def _check_shapes(host: HostBlock, scale: float) -> None:
    hidden = host.mlp.fc1_weight.shape[0]
    expected = {
        "attn.qkv": (host.qkv.weight, (3 * host.num_heads * host.head_dim, host.dim)),
        "attn.proj": (host.proj.weight, (host.dim, host.num_heads * host.head_dim)),
        "mlp.fc1": (host.mlp.fc1_weight, (hidden, host.dim)),
        "mlp.fc2": (host.mlp.fc2_weight, (host.dim, hidden)),
    }
    for name, (weight, shape) in expected.items():
        if weight.shape != shape:
            raise NotImplementedError(
                f"block.{name}.weight must have shape {shape}, got {tuple(weight.shape)}"
            )
    if abs(scale - host.head_dim**-0.5) > 1e-6 * scale:
        raise NotImplementedError(
            f"block.attn.scale must be head_dim ** -0.5 = {host.head_dim**-0.5}, got {scale}"
        )
