# SPDX-License-Identifier: Apache-2.0
"""timm's ``NaFlexVit`` with a compressor, for images and for padded batches of patches.

A padded batch holds the patches of images of different sizes, with their coordinates in
``patch_coord``. The grids are read from there; where it is on a CUDA device, the host waits for
that, once in a forward pass. torch.compile leaves such a pass to eager mode.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit

from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.blocks import CoarseBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import CompressedModel, Family, refuse_masks, require_methods
from uhd_ops.retrofit.padded_layout import PaddedLayout, eager_if_padded, refuse_maps
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


class CompressedNaFlexVitBlock(CompressedRopeBlock):
    """Block ``layer`` of a NaFlexVit."""

    def _positions(
        self,
        layout: TokenLayout | PaddedLayout,
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


class CompressedNaFlexVit(CompressedModel):
    """The methods that a compressed NaFlexVit replaces."""

    @eager_if_padded
    def forward_features(
        self,
        patches: torch.Tensor,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor | None]:
        """As in the model's class; ``patches`` and ``patch_valid`` returned are the merged ones."""
        refuse_masks(attn_mask, is_causal=False)
        layout = self._layout(patches, patch_coord, patch_valid)
        features = self._run(layout, super().forward_features, patches, patch_coord, patch_valid)
        if isinstance(layout, TokenLayout):
            return features
        behind = self._behind(layout)
        if patch_valid is not None or not behind.full:
            features["patch_valid"] = behind.valid
        return features

    @eager_if_padded
    def forward_intermediates(
        self,
        x: torch.Tensor | dict[str, torch.Tensor],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid.

        For a padded batch, a dictionary returned has ``merged_patch_valid``, the validity of those
        from the compressed block on and of ``image_features``, beside ``patch_valid``.
        """
        images = x
        if isinstance(x, dict):
            images, patch_coord = x["patches"], x["patch_coord"]
            patch_valid = x.get("patch_valid", patch_valid)
            attn_mask = x.get("attn_mask", attn_mask)
        refuse_masks(attn_mask, is_causal=False)
        layout = self._layout(images, patch_coord, patch_valid)
        refuse_maps(layout, output_fmt)
        result = self._intermediates(
            layout,
            super().forward_intermediates,
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
            patch_coord=patch_coord,
            patch_valid=patch_valid,
        )
        if output_dict and isinstance(layout, PaddedLayout):
            result["merged_patch_valid"] = layout.merged(self._windows()[-1]).valid
        return result

    def _layout(
        self,
        x: torch.Tensor,
        patch_coord: torch.Tensor | None,
        patch_valid: torch.Tensor | None,
    ) -> TokenLayout | PaddedLayout:
        if self.training and self.patch_drop is not None:
            raise NotImplementedError(
                "patch dropout leaves no grid to merge windows of: set vit.patch_drop to None, or "
                "remove the compressor"
            )
        prefix, frequencies = self.num_prefix_tokens, frequencies_of(self.rope)
        if patch_coord is not None:
            return PaddedLayout.of(patch_coord, patch_valid, prefix, x.device, frequencies)
        if patch_valid is not None:
            raise NotImplementedError(
                "patch_valid must come with patch_coord in a model with a compressor, which needs "
                "the grids of what is valid"
            )
        height, width = self.embeds.dynamic_feat_size((x.shape[-2], x.shape[-1]))
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
