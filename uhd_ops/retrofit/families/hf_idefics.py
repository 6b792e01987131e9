# SPDX-License-Identifier: Apache-2.0
"""The vision towers of Idefics 2, Idefics 3 and SmolVLM in transformers, with a compressor.

They are SigLIPs for images of any aspect ratio: ``patch_attention_mask (B, H, W)`` marks the
patches of an image, a rectangle in the top-left corner, and their positions are fractions of it.
Behind the compressor there are ``ceil(H / window) * ceil(W / window)`` tokens for every image,
those of its own ``ceil(h / window) * ceil(w / window)`` windows in the same corner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import Family, TokenLayout
from uhd_ops.retrofit.families._hf_models import (
    CoarseMaskedLayer,
    CompressedHfModel,
    CompressedLayer,
    require_understood,
)
from uhd_ops.retrofit.families.hf_clip import PackedClip
from uhd_ops.retrofit.families.hf_clip import read as read  # their layers are those of SigLIP
from uhd_ops.retrofit.packed import Grid
from uhd_ops.retrofit.padded_layout import FramedLayout
from uhd_ops.retrofit.relative_positions import StandIn


class CompressedIdeficsVisionTransformer(CompressedHfModel):
    """A vision tower with a compressor."""

    blocks_name = "encoder.layers"

    def _layout(
        self,
        pixel_values: torch.Tensor,
        patch_attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> TokenLayout | FramedLayout:
        images, _, height, width = pixel_values.shape
        frame = height // self.config.patch_size, width // self.config.patch_size
        if patch_attention_mask is None:
            return TokenLayout(*frame, 0)
        expected = images, *frame
        if patch_attention_mask.shape != expected:
            raise ValueError(
                f"patch_attention_mask must have shape {expected} for images of {height} x {width} "
                f"px, got {tuple(patch_attention_mask.shape)}"
            )
        return layout_of(patch_attention_mask, pixel_values.device, self._windows()[-1])


@torch.compiler.disable(reason="the grids of a padded batch are values of a tensor")
def layout_of(mask: torch.Tensor, device: torch.device, window: int) -> TokenLayout | FramedLayout:
    """Read the grids of a batch; on a CUDA device the host waits for them.

    Args:
        mask: ``patch_attention_mask (B, H, W)``, False for padding.
        device: Where the images are.
        window: Side of a window, in tokens.

    Raises:
        ValueError: The patches of an image are not the top-left corner.
    """
    layout = FramedLayout.of_mask(mask, device)
    if layout.full:
        return TokenLayout(*layout.frame, 0)
    layout.merged(window)  # here, because tracing would stop at it again
    return layout


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "encoder.layers", "EncoderLayer")


class PackedIdefics(PackedClip):
    """A vision tower on packed views, without padding."""

    def absolute(self, grid: Grid) -> torch.Tensor:
        """What the model adds to an image of this grid, here to one whose embedding is zero."""
        embeddings, table = self.vit.embeddings, self.vit.embeddings.position_embedding.weight
        zeros = table.new_zeros((1, table.shape[1], *grid))
        without = StandIn(embeddings, patch_embedding=lambda pixels: zeros)
        rows, cols = self.patch_size(self.vit)
        pixels = table.new_empty(()).expand(1, 3, grid[0] * rows, grid[1] * cols)
        mask = torch.ones((1, *grid), dtype=torch.bool, device=table.device)
        return type(embeddings).forward(without, pixels, mask)[0]


FAMILY = Family(
    CompressedIdeficsVisionTransformer,
    CompressedLayer,
    CoarseMaskedLayer,
    check,
    packed=PackedIdefics,
)
