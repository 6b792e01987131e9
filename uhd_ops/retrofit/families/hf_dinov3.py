# SPDX-License-Identifier: Apache-2.0
"""``DINOv3ViTModel`` and ``DINOv3ViTBackbone`` of transformers with a compressor.

Every layer is given the rotary embeddings of the patches. Those of the merged tokens are derived
from them, because the model draws its coordinates at random in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.positions import Frequencies, Rotary
from uhd_ops.retrofit.adapter import Family, TokenLayout
from uhd_ops.retrofit.families._hf_models import (
    CoarseLayer,
    CompressedBackbone,
    CompressedHfModel,
    CompressedLayer,
    PackedHfModel,
    require_understood,
)
from uhd_ops.retrofit.packed import Grid, Tables

Table = tuple[torch.Tensor, torch.Tensor]  # cosines, then sines


class CompressedDinov3(CompressedHfModel):
    """A model with a compressor."""

    blocks_name = "model.layer"

    def _layout(self, pixel_values: torch.Tensor, **options: Any) -> TokenLayout:
        layout = super()._layout(pixel_values, **options)
        return layout._replace(frequencies=frequencies_of(self.rope_embeddings.inv_freq))

    def _patch_embedding(self) -> nn.Conv2d:
        return self.embeddings.patch_embeddings


class CompressedDinov3Layer(CompressedLayer):
    """Layer ``layer``."""

    def _positions(
        self, layout: TokenLayout, *args: Any, position_embeddings: Table, **kwargs: Any
    ) -> Rotary:
        cos, sin = position_embeddings
        return Rotary(sin[:, None], cos[:, None])


class CoarseDinov3Layer(CoarseLayer):
    """A layer after the compressor."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: Table,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in the layer's class, with the positions of the merged tokens."""
        layout = self._layout_of(hidden_states)
        fine_cos, fine_sin = position_embeddings

        def derive(cos: torch.Tensor) -> Table:
            sin, cos = layout.merge_table(fine_sin, cos, self.window, self.positions)
            return cos, sin

        merged = self._derived(hidden_states, fine_cos, derive)
        return super().forward(hidden_states, attention_mask, merged, **kwargs)


def frequencies_of(inverse: torch.Tensor) -> Frequencies:
    """Return those of a table whose channels are rows, columns, and both again.

    On small grids neighbours differ by more than pi: 4 pi over the side of the grid.
    """
    slowest = len(inverse) - 1
    channels = torch.arange(1, 3, device=inverse.device) * len(inverse) - 1
    return Frequencies(
        (inverse / inverse[slowest]).repeat(4), channels.repeat_interleave(len(inverse)).repeat(2)
    )


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "model.layer")


class CompressedDinov3Backbone(CompressedDinov3, CompressedBackbone):
    """A backbone with a compressor."""

    maps_have_prefix = False


class PackedDinov3(PackedHfModel):
    """A DINOv3 on packed views."""

    blocks_name = "model.layer"
    position_names = ("rope_embeddings",)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding by a convolution."""
        conv = self.vit.embeddings.patch_embeddings
        return self.convolve(conv, pixels.to(conv.weight.dtype))

    def prefix(self) -> torch.Tensor:
        """Class and register tokens."""
        return torch.cat([self.vit.embeddings.cls_token, self.vit.embeddings.register_tokens], 1)

    def rope(self, grid: Grid) -> Tables:
        """Made for images of that size, whose values it does not read."""
        rows, cols = self.patch_size(self.vit)
        weight = self.vit.embeddings.patch_embeddings.weight
        image = weight.new_empty(()).expand(1, 1, grid[0] * rows, grid[1] * cols)
        cos, sin = self.vit.rope_embeddings(image)
        return sin, cos

    def draws_positions(self) -> bool:
        """In training, if the config says so."""
        config = self.vit.config
        options = (config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale)
        return self.vit.training and any(option is not None for option in options)

    def frequencies(self) -> Frequencies:
        """As for images of one size."""
        return frequencies_of(self.vit.rope_embeddings.inv_freq)


FAMILY = Family(
    CompressedDinov3,
    CompressedDinov3Layer,
    CoarseDinov3Layer,
    check,
    packed=PackedDinov3,
)
BACKBONE = Family(
    CompressedDinov3Backbone,
    CompressedDinov3Layer,
    CoarseDinov3Layer,
    check,
    packed=PackedDinov3,
)
