# SPDX-License-Identifier: Apache-2.0
"""timm's ``Cait`` with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import nn
from torch.nn import functional

from uhd_ops.nn.block_spec import BlockSpec, OwnAttentionSpec
from uhd_ops.retrofit import checks
from uhd_ops.retrofit.blocks import CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.families import _timm_parts as parts
from uhd_ops.retrofit.families.timm_vision_transformer import require_patch_embedding
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import CompressedModel, Family, image_layout, require_methods


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a ``LayerScaleBlock``: pre-norm, with talking heads."""
    checks.require_own_forward(block, "block")
    checks.require_plain(block, "block", ("gamma_1", "gamma_2"))
    drop_path = parts.drop_path(block.drop_path, "block.drop_path")
    attention = OwnAttentionSpec(
        _check_attention(block.attn, "block.attn"),
        talking_heads,
        norm=parts.norm(block.norm1, "block.norm1"),
        post=block.gamma_1,
        drop_path=drop_path,
    )
    mlp = parts.mlp(
        block.mlp,
        "block.mlp",
        norm=parts.norm(block.norm2, "block.norm2"),
        post=block.gamma_2,
        drop_path=drop_path,
    )
    return checks.check_shapes(BlockSpec(block.attn.qkv.in_features, (attention,), (mlp,)))


def _check_attention(module: nn.Module, name: str) -> nn.Module:
    checks.require_exactly(module, name, (TalkingHeadAttn,))
    checks.require_own_forward(module, name)
    for part in ("qkv", "proj", "proj_l", "proj_w"):
        checks.linear(getattr(module, part), f"{name}.{part}")
    for part in ("attn_drop", "proj_drop"):
        checks.dropout(getattr(module, part), f"{name}.{part}")
    return module


def talking_heads(
    module: nn.Module, windows: torch.Tensor, shape: tuple[int, int], view_tokens: torch.Tensor
) -> torch.Tensor:
    """``TalkingHeadAttn`` inside windows: heads are mixed before and after the softmax.

    The second mixing adds a bias to every weight, which no softmax normalises: over the N tokens of
    a view it adds up to N biases. The n tokens of a window stand for all of them, each with N / n
    biases; otherwise a window of equal tokens would not become what the block makes of it.

    Args:
        module: A ``TalkingHeadAttn``.
        windows: ``(M, n, C)``.
        shape: Height and width of the windows.
        view_tokens: N for each window, ``(M,)``.
    """
    q, k, v = module.qkv(windows).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    scores = torch.einsum("mqhd,mkhd->mqkh", q * module.scale, k)
    weights = module.proj_l(scores).softmax(-2)
    weights = functional.linear(weights, module.proj_w.weight)
    if module.proj_w.bias is not None:
        share = view_tokens[:, None].to(windows.dtype) / windows.shape[1]
        weights = weights + (module.proj_w.bias * share).to(weights.dtype)[:, None, None]
    out = torch.einsum("mqkh,mkhd->mqhd", module.attn_drop(weights), v)
    return module.proj_drop(module.proj(out.flatten(-2)))


# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_cls", "forward_intermediates")


class CompressedCait(CompressedModel):
    """A Cait with a compressor."""

    def _layout(self, x: torch.Tensor, **options: Any) -> TokenLayout:
        return image_layout(self, x, 0)  # the class token joins behind the blocks


def check(vit: Cait, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, Cait, _METHODS)
    require_patch_embedding(vit)


FAMILY = Family(CompressedCait, CompressedBlock, None, check)
