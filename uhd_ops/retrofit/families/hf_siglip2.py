# SPDX-License-Identifier: Apache-2.0
"""``Siglip2VisionModel`` of transformers with a compressor: batches of images of any sizes.

Images come as patches, padded to one length. Behind the compressor every image has its merged
tokens in front, ``ceil(h / window) * ceil(w / window)`` of them for ``spatial_shapes`` (h, w), and
the sequence is as long as the longest needs. Layers and pooling head see the padding that is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families._hf_models import (
    CoarseLayer,
    CoarseMaskedLayer,
    CompressedHfModel,
    CompressedLayer,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Sides
from uhd_ops.retrofit.padded_layout import PaddedLayout


class CompressedSiglip2VisionModel(CompressedHfModel):
    """A vision model with a compressor."""

    blocks_name = "encoder.layers"

    def _layout(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None,
        spatial_shapes: torch.Tensor,
        **options: Any,
    ) -> PaddedLayout:
        return layout_of(pixel_values, pixel_attention_mask, spatial_shapes, self._windows()[-1])


class CoarseSiglip2Head(CoarseLayer):
    """The pooling head."""

    def forward(
        self, hidden_state: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As in the head's class, with the mask of the merged tokens."""
        merged = self._layout_of(hidden_state).merged(self.window)
        return super().forward(hidden_state, None if merged.full else merged.valid)


@torch.compiler.disable(reason="the grids of a padded batch are values of a tensor")
def layout_of(
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None,
    shapes: torch.Tensor,
    window: int,
) -> PaddedLayout:
    """Read the grids of a batch; on a CUDA device, as in the original, the host waits for them.

    Args:
        pixel_values: ``(B, L, 3 * patch²)``.
        pixel_attention_mask: ``(B, L)``, 1 for a patch and 0 for padding; None for no padding.
        shapes: ``spatial_shapes (B, 2)``.
        window: Side of a window, in tokens.

    Raises:
        ValueError: The mask does not mark the first h * w places of every image.
    """
    layout = PaddedLayout(
        PackedGrids.of(shapes.tolist()), pixel_values.shape[1], 0, pixel_values.device
    )
    mask = pixel_attention_mask
    mask = torch.ones_like(layout.valid) if mask is None else mask.to(layout.valid)
    if not torch.equal(mask, layout.valid):
        raise ValueError(
            "pixel_attention_mask must mark the first h * w of the "
            f"{pixel_values.shape[1]} patches of each image, as spatial_shapes says: "
            f"{[h * w for h, w in layout.grids]}"
        )
    layout.merged(window)  # here, because tracing would stop at it again
    return layout


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "encoder.layers", "EncoderLayer")


class PackedSiglip2(PackedHfModel):
    """A SigLIP 2 on packed views, without padding."""

    blocks_name = "encoder.layers"
    position_names = ("embeddings.position_embedding",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a linear layer; the channels of a pixel lie side by side."""
        linear = self.vit.embeddings.patch_embedding
        return linear(pixels.permute(0, 2, 3, 1).flatten(1).to(linear.weight.dtype))

    def absolute(self, grid: Grid) -> torch.Tensor:
        """Resampled as the model does: bilinear, smoothed where it shrinks."""
        shape, length = torch.tensor([grid], device="cpu"), grid[0] * grid[1]
        return self.vit.embeddings.resize_positional_embeddings(self.learned(), shape, length)[0]

    def learned(self) -> torch.Tensor:
        """The whole table."""
        table = self.vit.embeddings.position_embedding.weight
        return table.unflatten(0, (self.vit.embeddings.position_embedding_size, -1))

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm after the last layer."""
        return prefix, self.vit.post_layernorm(patches)


FAMILY = Family(
    CompressedSiglip2VisionModel,
    CompressedLayer,
    CoarseMaskedLayer,
    check,
    heads={"head": CoarseSiglip2Head},
    packed=PackedSiglip2,
)
