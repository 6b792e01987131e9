# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled`` with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from uhd_ops.retrofit.blocks import CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import (
    CompressedModel,
    Family,
    image_layout,
    refuse_masks,
    require_methods,
)

# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class CompressedVitBlock(CompressedBlock):
    """A block of a VisionTransformer."""

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        refuse_masks(attn_mask, is_causal)
        return super().forward(x)


class CompressedVisionTransformer(CompressedModel):
    """The methods that a compressed VisionTransformer replaces."""

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """As in the model's class; the patch tokens returned are the merged ones."""
        refuse_masks(attn_mask, is_causal)
        return self._run(self._layout(x), super().forward_features, x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid."""
        refuse_masks(attn_mask, is_causal)
        return self._intermediates(
            self._layout(x),
            super().forward_intermediates,
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        return image_layout(self, x, self.num_prefix_tokens)


def check(vit: VisionTransformer, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, VisionTransformer, _METHODS)
    require_patch_embedding(vit)


def require_patch_embedding(vit: torch.nn.Module) -> None:
    """Refuse a patch embedding that does not tell its grid."""
    embed = vit.patch_embed
    size = getattr(embed, "dynamic_feat_size", None)
    if size is None or embed.img_size is None or size(embed.img_size) != tuple(embed.grid_size):
        raise NotImplementedError(
            f"vit.patch_embed must tell its patch grid by dynamic_feat_size, as PatchEmbed does; "
            f"{type(embed).__name__} does not"
        )


FAMILY = Family(CompressedVisionTransformer, CompressedVitBlock, None, check)
