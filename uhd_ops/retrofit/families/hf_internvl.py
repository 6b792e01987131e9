# SPDX-License-Identifier: Apache-2.0
"""``InternVLVisionModel`` of transformers, the tower of InternVL 2.5 to 3.5, with a compressor."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import ScaleView, body_class
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import (
    CompressedHfModel,
    CompressedLayer,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Sides


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a layer: pre-norm with LayerScale, norms of queries over all heads."""
    modules.require_own_forward(block, "layer")
    cls = body_class(block)
    norms = nn.LayerNorm, parts.sibling(cls, "InternVLVisionRMSNorm")
    inner = block.attention

    def norm(name: str) -> nn.Module | None:
        module = block.get_submodule(name)
        return None if type(module) is nn.Identity else parts.norm(module, f"layer.{name}", *norms)

    attention = parts.attention(
        inner,
        "layer.attention",
        parts.sibling(cls, "InternVLVisionAttention"),
        norm=norm("layernorm_before"),
        q_norm=norm("attention.q_norm"),
        k_norm=norm("attention.k_norm"),
        joint_norms=True,
        post=ScaleView(block, "lambda_1", calls=False),
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, "InternVLVisionMLP"),),
        norm=norm("layernorm_after"),
        post=ScaleView(block, "lambda_2", calls=False),
        output_dropout=modules.dropout(block.dropout, "layer.dropout"),
    )
    return BlockSpec(inner.embed_dim, (attention,), (mlp,), block=block, name="layer")


class CompressedInternVLVisionModel(CompressedHfModel):
    """A vision model with a compressor."""

    blocks_name = "encoder.layer"


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "encoder.layer")


class PackedInternVL(PackedHfModel):
    """An InternViT on packed views."""

    blocks_name = "encoder.layer"
    position_names = ("embeddings.position_embeddings",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution."""
        conv = self.vit.embeddings.patch_embeddings.projection
        return self.convolve(conv, pixels.to(conv.weight.dtype))

    def prefix(self) -> torch.Tensor:
        """The class token, with its position where there are any."""
        cls, table = self.vit.embeddings.cls_token, self.vit.embeddings.position_embeddings
        return cls if table is None else cls + table[:, :1]

    def absolute(self, grid: Grid) -> torch.Tensor | None:
        """As the model resamples them."""
        table = self.vit.embeddings.position_embeddings
        return None if table is None else self._interpolated(1, grid, table.shape[-1])[1:]

    def learned(self) -> torch.Tensor | None:
        """Without that of the class token."""
        table = self.vit.embeddings.position_embeddings
        if table is None:
            return None
        return table[0, 1:].unflatten(0, self.vit.embeddings.patch_embeddings.patch_shape)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout."""
        return self.vit.embeddings.dropout(x)

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm after the last layer, if any."""
        return self.vit.layernorm(prefix), self.vit.layernorm(patches)


FAMILY = Family(CompressedInternVLVisionModel, CompressedLayer, None, check, packed=PackedInternVL)
