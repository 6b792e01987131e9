# SPDX-License-Identifier: Apache-2.0
"""timm's ``Eva`` with a compressor: EVA, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm import layers
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.retrofit.adapter import (
    CompressedModel,
    Family,
    TokenLayout,
    image_layout,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid, Tables
from uhd_ops.retrofit.rope import (
    CoarseRopeBlock,
    CompressedRopeBlock,
    RotaryTables,
    frequencies_of,
    require_rope,
    rope_tables,
)


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of an ``EvaBlock``, pre-norm, or of an ``EvaBlockPostNorm``."""
    modules.require_own_forward(block, "block")
    post_norm = body_class(block) is EvaBlockPostNorm
    # Sapiens2 scales the attention only.
    around = functools.partial(parts.around, block, scale="gamma_", post_norm=post_norm)
    host = attention(block.attn, "block.attn", **around(1))
    mlp = parts.mlp(block.mlp, "block.mlp", **around(2))
    return BlockSpec(host.proj.out_features, (host,), (mlp,), block=block)


def attention(module: nn.Module, name: str, **branch: object) -> AttentionSpec:
    """Read timm's attention with rotary embeddings, ``AttentionRope`` or ``EvaAttention``.

    Args:
        module: The attention.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec.
    """
    classes = layers.AttentionRope, EvaAttention
    modules.require_exactly(module, name, classes)
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
        return tuple(getattr(module, part) for part in names)
    if getattr(module, "q_bias", None) is None:
        return (module.qkv,)
    # A compressor trains the bias of the keys, a buffer of zeros that no checkpoint holds.
    return (parts.biased(module),)


# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "_pos_embed")


class CompressedEva(CompressedModel):
    """An Eva with a compressor."""

    def _layout(self, x: torch.Tensor, **options: Any) -> TokenLayout:
        return image_layout(self, x, self.num_prefix_tokens, frequencies_of(self.rope))


def check(vit: Eva, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, Eva, _METHODS)
    parts.require_patch_embedding(vit)
    require_rope(vit)


class PackedEva(RotaryTables, parts.PackedVisionTransformer):
    """An Eva on packed views."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout and the norm in front of the first block."""
        return self.vit.norm_pre(self.vit.pos_drop(x))

    def rope(self, grid: Grid) -> Tables | None:
        """As ``dynamic_img_size`` and ``set_input_size`` make them."""
        return rope_tables(self.vit.rope, grid, any_size=self.vit.dynamic_img_size)


FAMILY = Family(CompressedEva, CompressedRopeBlock, CoarseRopeBlock, check, packed=PackedEva)
