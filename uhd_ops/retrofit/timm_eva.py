# SPDX-License-Identifier: Apache-2.0
"""timm's ``Eva`` with a compressor: EVA, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva

from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import (
    CompressedModel,
    Family,
    image_layout,
    refuse_masks,
    require_methods,
)
from uhd_ops.retrofit.rope import (
    CoarseRopeBlock,
    CompressedRopeBlock,
    frequencies_of,
    require_rope,
)
from uhd_ops.retrofit.timm_vision_transformer import require_patch_embedding

# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "_pos_embed")


class CompressedEva(CompressedModel):
    """The methods that a compressed Eva replaces."""

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
        )

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        return image_layout(self, x, self.num_prefix_tokens, frequencies_of(self.rope))


def check(vit: Eva, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, Eva, _METHODS)
    require_patch_embedding(vit)
    require_rope(vit)


FAMILY = Family(CompressedEva, CompressedRopeBlock, CoarseRopeBlock, check)
