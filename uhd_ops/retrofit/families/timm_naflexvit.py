# SPDX-License-Identifier: Apache-2.0
"""timm's ``NaFlexVit`` with a compressor, for images and for padded batches of patches.

A padded batch holds the patches of images of different sizes, with their coordinates in
``patch_coord``. The grids are read from there; where it is on a CUDA device, the host waits for
that, once in a forward pass. torch.compile leaves such a pass to eager mode.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit

from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.blocks import CoarseBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import CompressedPaddedModel, Family, refuse_masks, require_methods
from uhd_ops.retrofit.padded_layout import PaddedLayout
from uhd_ops.retrofit.rope import (
    CompressedRopeBlock,
    frequencies_of,
    merge_rope,
    require_rope,
)

# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = (
    "forward",
    "forward_features",
    "forward_head",
    "forward_intermediates",
    "_forward_embeds",
    "_generate_rope_naflex",
    "_pool",
)

Layout = TokenLayout | PaddedLayout


class CompressedNaFlexVitBlock(CompressedRopeBlock):
    """Block ``layer`` of a NaFlexVit."""

    def _positions(
        self,
        layout: Layout,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> Rotary | None:
        rotary = super()._positions(layout, rope)
        if rotary is None or isinstance(layout, TokenLayout):
            return rotary
        return Rotary(layout.pack(rotary.sin), layout.pack(rotary.cos))


class CoarseNaFlexVitBlock(CoarseBlock):
    """A block behind it."""

    def forward(self, x: torch.Tensor, **options: torch.Tensor | None) -> torch.Tensor:
        """Run the block on merged tokens with their positions and, if padded, their mask.

        Args:
            x: Tokens ``(B, P + M, C)``.
            options: ``rope`` and ``attn_mask`` of the fine tokens, where there are any.
        """
        layout = self._layout_of(x)
        layout.merged(self.window).check(x)
        rope = options.get("rope")
        if rope is not None:
            derive = functools.partial(
                merge_rope, layout=layout, window=self.window, positions=self.positions
            )
            # Tables with a row per head belong to one block: not worth keeping.
            shared = rope.dim() == 2 or rope.shape[-3] == 1
            options["rope"] = self._derived(x, rope, derive) if shared else derive(rope)
        if isinstance(layout, PaddedLayout):
            options["attn_mask"] = layout.merged(self.window).key_mask(x.dtype)
        return super().forward(x, **options)


class CompressedNaFlexVit(CompressedPaddedModel):
    """A NaFlexVit with a compressor."""

    adapted: ClassVar[Mapping[str, str]] = CompressedPaddedModel.adapted | {
        "forward_features": "_features"
    }

    def _features(self, layout: Layout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call ``forward_features``; ``patches`` and ``patch_valid`` are the merged ones."""
        features = self._run(layout, method, arguments)
        if isinstance(layout, PaddedLayout):
            behind = self._behind(layout)
            if arguments["patch_valid"] is not None or not behind.full:
                features["patch_valid"] = behind.valid
        return features

    def _layout(
        self,
        x: torch.Tensor | dict[str, torch.Tensor] | None = None,
        patches: torch.Tensor | None = None,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
        **options: Any,
    ) -> Layout:
        images = patches if x is None else x
        if isinstance(images, dict):
            refuse_masks(images)
            patch_coord, patch_valid = images["patch_coord"], images.get("patch_valid", patch_valid)
            images = images["patches"]
        if self.training and self.patch_drop is not None:
            raise NotImplementedError(
                "patch dropout leaves no grid to merge windows of: set vit.patch_drop to None, or "
                "remove the compressor"
            )
        prefix, frequencies = self.num_prefix_tokens, frequencies_of(self.rope)
        if patch_coord is not None:
            return PaddedLayout.of(patch_coord, patch_valid, prefix, images.device, frequencies)
        if patch_valid is not None:
            raise NotImplementedError(
                "patch_valid must come with patch_coord in a model with a compressor, which needs "
                "the grids of what is valid"
            )
        height, width = self.embeds.dynamic_feat_size(images.shape[-2:])
        return TokenLayout(height, width, prefix, frequencies)


def check(vit: NaFlexVit, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, NaFlexVit, _METHODS)
    require_rope(vit)
    if type(vit.embeds) is not NaFlexEmbeds:
        raise NotImplementedError(
            f"vit.embeds must be NaFlexEmbeds, got {type(vit.embeds).__name__}"
        )


FAMILY = Family(CompressedNaFlexVit, CompressedNaFlexVitBlock, CoarseNaFlexVitBlock, check)
