# SPDX-License-Identifier: Apache-2.0
"""What timm's encoders that return ``(B, h, w, C)`` have in common: Qwen3 and DeepSeek.

They give whatever leaves the last block the grid of the patches. That raises an error after merging
where a side is odd, and returns a quarter of the channels without one where both are even. So the
mixin asks for the blocks' outputs as sequences and gives them the grid that they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models._features import feature_take_indices
from torch import nn

from uhd_ops.retrofit.adapter import (
    CompressedModel,
    TokenLayout,
    encoder_or_self,
    image_layout,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Sides
from uhd_ops.retrofit.rope import RotaryTables, frequencies_of, require_rope


class CompressedEncoder(CompressedModel):
    """An encoder with a compressor."""

    adapted: ClassVar[Mapping[str, str]] = {
        "forward_features": "_features",
        "forward_intermediates": "_intermediates",
    }

    def _features(self, layout: TokenLayout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call ``forward_features``; what it returns, ``(B, h, w, C)``, are the merged tokens."""
        return self.forward_intermediates(**arguments, indices=1, output_fmt="NLC")[0]

    def _intermediates(self, layout: TokenLayout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call ``forward_intermediates``; maps from the compressed block on have their grid."""
        asked, depth = arguments, len(self.blocks)
        taken, last = feature_take_indices(depth, asked["indices"])
        last = last if asked["stop_early"] else depth - 1
        reshape, as_dict = asked["output_fmt"] == "NCHW", asked.get("output_dict", False)
        changed = {
            "indices": sorted({*taken, last}),
            "norm": False,
            "output_fmt": "NLC" if reshape else asked["output_fmt"],
            "intermediates_only": True,
            "output_dict": False,
        }
        sequences = self._run(layout, method, asked | changed)
        maps = sequences if last in taken else sequences[:-1]
        maps = [self._final_norm(y) for y in maps] if asked["norm"] else maps
        maps = [self._to_map(layout, y) for y in maps] if reshape else maps
        if asked["intermediates_only"]:
            return {"image_intermediates": maps} if as_dict else maps
        features = self._to_grid(layout, self._final_norm(sequences[-1]))
        if as_dict:
            return {"image_features": features, "image_intermediates": maps}
        return features, maps

    def _final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm after the last block, which Qwen3's encoder does not have."""
        return getattr(self, "norm", nn.Identity())(x)

    def _layout(self, x: torch.Tensor, **options: Any) -> TokenLayout:
        return image_layout(self, x, 0, frequencies_of(self.rope))


class PackedEncoder(RotaryTables, parts.PackedTimm):
    """An encoder on packed views."""

    methods = ("forward_features", "_pos_embed")

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm after the last block, which Qwen3's encoder does not have."""
        return prefix, getattr(self.vit, "norm", nn.Identity())(patches)


def require_encoder(vit: nn.Module, encoder: type[nn.Module], classifier: type[nn.Module]) -> None:
    """Refuse an encoder, or a classifier around one, that is not understood."""
    methods = ("forward", "forward_features", "forward_intermediates")
    if isinstance(vit, classifier):
        require_methods(vit, classifier, methods)
    vit = encoder_or_self(vit)
    require_methods(vit, encoder, (*methods, "_pos_embed"))
    parts.require_patch_embedding(vit)
    require_rope(vit)
