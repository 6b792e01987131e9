# SPDX-License-Identifier: Apache-2.0
"""What timm's encoders that return ``(B, h, w, C)`` have in common: Qwen3 and DeepSeek.

They give whatever leaves the last block the grid of the patches. That raises an error after merging
where a side is odd, and returns a quarter of the channels without one where both are even. So the
mixin asks for the blocks' outputs as sequences and gives them the grid that they have.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import nn

from uhd_ops.retrofit.families.timm_vision_transformer import require_patch_embedding
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import CompressedModel, encoder_or_self, image_layout, require_methods
from uhd_ops.retrofit.rope import frequencies_of, require_rope


class CompressedEncoder(CompressedModel):
    """The methods that a compressed encoder replaces."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As in the model's class; the tokens returned, ``(B, h, w, C)``, are the merged ones."""
        return self.forward_intermediates(x, 1, output_fmt="NLC")[0]

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
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid."""
        depth, layout = len(self.blocks), self._layout(x)
        taken, last = feature_take_indices(depth, indices)
        last = last if stop_early else depth - 1
        sequences = self._run(
            layout,
            super().forward_intermediates,
            x,
            indices=sorted({*taken, last}),
            stop_early=stop_early,
            output_fmt="NLC" if output_fmt == "NCHW" else output_fmt,
            intermediates_only=True,
        )
        maps = sequences if last in taken else sequences[:-1]
        maps = [self._final_norm(y) for y in maps] if norm else maps
        maps = [self._to_map(layout, y) for y in maps] if output_fmt == "NCHW" else maps
        if intermediates_only:
            return {"image_intermediates": maps} if output_dict else maps
        features = self._to_grid(layout, self._final_norm(sequences[-1]))
        if output_dict:
            return {"image_features": features, "image_intermediates": maps}
        return features, maps

    def _final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm behind the last block, which Qwen3's encoder does not have."""
        return getattr(self, "norm", nn.Identity())(x)

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        return image_layout(self, x, 0, frequencies_of(self.rope))


def require_encoder(vit: nn.Module, encoder: type[nn.Module], classifier: type[nn.Module]) -> None:
    """Refuse an encoder, or a classifier around one, that is not understood."""
    methods = ("forward", "forward_features", "forward_intermediates")
    if isinstance(vit, classifier):
        require_methods(vit, classifier, methods)
    vit = encoder_or_self(vit)
    require_methods(vit, encoder, (*methods, "_pos_embed"))
    require_patch_embedding(vit)
    require_rope(vit)
