# SPDX-License-Identifier: Apache-2.0
"""timm's ``Cait`` with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec, OwnAttentionSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import (
    CompressedBlock,
    CompressedModel,
    Family,
    TokenLayout,
    image_layout,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid, Sides


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a ``LayerScaleBlock``: pre-norm, with talking heads."""
    modules.require_own_forward(block, "block")
    modules.require_plain(block, "block", ("gamma_1", "gamma_2"))
    drop_path = parts.drop_path(block.drop_path, "block.drop_path")
    attention = OwnAttentionSpec(
        _check_attention(block.attn, "block.attn"),
        ("qkv", "proj", "proj_l", "proj_w"),
        norm=parts.norm(block.norm1, "block.norm1"),
        post=parts.factors(block, "gamma_1"),
        drop_path=drop_path,
    )
    mlp = parts.mlp(
        block.mlp,
        "block.mlp",
        norm=parts.norm(block.norm2, "block.norm2"),
        post=parts.factors(block, "gamma_2"),
        drop_path=drop_path,
    )
    return BlockSpec(block.attn.qkv.in_features, (attention,), (mlp,), block=block)


def _check_attention(module: nn.Module, name: str) -> nn.Module:
    modules.require_exactly(module, name, (TalkingHeadAttn,))
    modules.require_own_forward(module, name)
    for part in ("attn_drop", "proj_drop"):
        modules.dropout(getattr(module, part), f"{name}.{part}")
    return module


# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_cls", "forward_intermediates")


class CompressedCait(CompressedModel):
    """A Cait with a compressor."""

    def _layout(self, x: torch.Tensor, **options: Any) -> TokenLayout:
        return image_layout(self, x, 0)  # the class token joins after the blocks


def check(vit: Cait, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, Cait, _METHODS)
    parts.require_patch_embedding(vit)


class PackedCait(parts.PackedVisionTransformer):
    """A Cait on packed views."""

    methods = ("forward_features", "forward_cls")
    tail_names = ("blocks_token_only", "cls_token", "norm")
    _positioned = 0

    @classmethod
    def check(cls, vit: Cait) -> None:
        """Refuse a patch embedding that is not understood."""
        parts.PackedTimm.check(vit)

    def prefix(self) -> None:
        """The class token joins after the blocks."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout."""
        return self.vit.pos_drop(x)

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The class tokens attend to the patches of their views, and join them."""

        def class_token(views: torch.Tensor, grid: Grid) -> torch.Tensor:
            return self.vit.forward_cls(views)[:, :1]

        cls = self.by_grid(class_token, patches, sides)
        return self.vit.norm(cls)[:, None], self.vit.norm(patches)


FAMILY = Family(CompressedCait, CompressedBlock, None, check, packed=PackedCait)
