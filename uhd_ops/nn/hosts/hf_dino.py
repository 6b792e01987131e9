# SPDX-License-Identifier: Apache-2.0
"""The layers of DINOv2, with registers or without, and of DINOv3's ViT in transformers."""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import body_class
from uhd_ops.nn.hosts import hf_parts as parts

# Layer -> (what the names of its parts begin with, its DropPath, its gated MLP).
_NAMES = {
    "Dinov2Layer": ("Dinov2", "Dinov2DropPath", "Dinov2SwiGLUFFN"),
    "Dinov2WithRegistersLayer": (
        "Dinov2WithRegisters",
        "Dinov2WithRegistersDropPath",
        "Dinov2WithRegistersSwiGLUFFN",
    ),
    "DINOv3ViTLayer": ("DINOv3ViT", "Dinov3ViTDropPath", "DINOv3ViTGatedMLP"),
}


def read(block: nn.Module) -> HostBlock:
    """Return the parts of a layer: pre-norm, with LayerScale and one DropPath for both branches."""
    checks.require_own_forward(block, "layer")
    cls = body_class(block)
    family, drop_path, gated_mlp = _NAMES[cls.__name__]
    scale = parts.sibling(cls, f"{family}LayerScale")
    drop = parts.drop_path(block.drop_path, "layer.drop_path", parts.sibling(cls, drop_path))
    attention = parts.attention(
        block.attention,
        "layer.attention",
        parts.sibling(cls, f"{family}Attention"),
        norm=parts.norm(block.norm1, "layer.norm1"),
        post=parts.layer_scale(block.layer_scale1, "layer.layer_scale1", scale),
        drop_path=drop,
        rotate_half=True,
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, f"{family}MLP"), parts.sibling(cls, gated_mlp)),
        norm=parts.norm(block.norm2, "layer.norm2"),
        post=parts.layer_scale(block.layer_scale2, "layer.layer_scale2", scale),
        drop_path=drop,
    )
    host = HostBlock(block.norm1.normalized_shape[0], (attention,), (mlp,))
    return checks.check_shapes(host, "layer")
