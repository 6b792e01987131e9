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

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.adapter import (
    CoarseBlock,
    CompressedPaddedModel,
    Family,
    TokenLayout,
    refuse_masks,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid
from uhd_ops.retrofit.padded_layout import PaddedLayout
from uhd_ops.retrofit.rope import (
    CompressedRopeBlock,
    RotaryTables,
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
    """A block after it."""

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


def check(vit: NaFlexVit, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, NaFlexVit, _METHODS)
    require_rope(vit)
    if type(vit.embeds) is not NaFlexEmbeds:
        raise NotImplementedError(
            f"vit.embeds must be NaFlexEmbeds, got {type(vit.embeds).__name__}"
        )


class PackedNaFlexVit(RotaryTables):
    """A NaFlexVit on packed views, as it takes images: not as a padded batch of patches."""

    position_names = "embeds.pos_embed", "embeds.pos_embed_y", "embeds.pos_embed_x", "rope"

    methods = ("forward_features", "_forward_embeds")

    @classmethod
    def patch_size(cls, vit: NaFlexVit) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        return tuple(vit.embeds.patch_size)

    @classmethod
    def channels(cls, vit: NaFlexVit) -> int:
        """Channels of a pixel."""
        return vit.embeds.in_chans

    @classmethod
    def pads(cls, vit: NaFlexVit) -> bool:
        """Whether ``dynamic_img_pad`` pads images."""
        return vit.embeds.dynamic_img_pad

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution or a linear layer."""
        embeds = self.vit.embeds
        if not embeds.is_linear:
            return embeds.norm(self.convolve(embeds.proj, pixels))
        x = (pixels.permute(0, 2, 3, 1) if embeds.channels_last else pixels).flatten(1)
        x = x if embeds.norm_input is None else embeds.norm_input(x)
        return embeds.norm(embeds.proj(x))

    def prefix(self) -> torch.Tensor | None:
        """Class and register tokens; they have no positions."""
        tokens = parts.prefix_tokens(self.vit.embeds)
        return torch.cat(tokens, 1) if tokens else None

    def absolute(self, grid: Grid) -> torch.Tensor | None:
        """Learned or factorised, as the embedding resamples them for an image."""
        embeds = self.vit.embeds
        if embeds.pos_embed_type == "none":
            return None
        add = {
            "learned": embeds._apply_learned_pos_embed,
            "factorized": embeds._apply_factorized_pos_embed,
        }[embeds.pos_embed_type]
        weight = embeds.proj.weight
        table = weight.new_zeros((1, grid[0] * grid[1], weight.shape[0]))
        add(table, list(grid))  # in place
        return table[0]

    def learned(self) -> torch.Tensor | None:
        """The table of all places, or the sum of those of rows and columns."""
        embeds = self.vit.embeds
        if embeds.pos_embed_type == "factorized":
            return embeds.pos_embed_y[0][:, None] + embeds.pos_embed_x[0]
        return None if embeds.pos_embed is None else embeds.pos_embed[0]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout and the norm in front of the first block."""
        return self.vit.norm_pre(self.vit.embeds.pos_drop(x))


FAMILY = Family(
    CompressedNaFlexVit,
    CompressedNaFlexVitBlock,
    CoarseNaFlexVitBlock,
    check,
    packed=PackedNaFlexVit,
)
