# SPDX-License-Identifier: Apache-2.0
"""``PixtralVisionModel`` of transformers with a compressor: images of any sizes in one sequence.

Behind the compressor every image has ``ceil(h / window) * ceil(w / window)`` tokens for its h x w
patches, the mask keeps these apart, and their rotary embeddings come from those of the patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import CompressedHfModel, require_understood
from uhd_ops.retrofit.families._hf_packed import (
    CoarsePackedLayer,
    CompressedPackedLayer,
    PackedAlready,
)
from uhd_ops.retrofit.packed_layout import PackedLayout


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a layer: RMSNorms, separate projections, a gated MLP."""
    modules.require_own_forward(block, "layer")
    cls = body_class(block)
    norm = parts.sibling(cls, "PixtralRMSNorm")
    attention = parts.attention(
        block.attention,
        "layer.attention",
        parts.sibling(cls, "PixtralAttention"),
        norm=parts.norm(block.attention_norm, "layer.attention_norm", norm),
        rotate_half=1,
    )
    mlp = parts.mlp(
        block.feed_forward,
        "layer.feed_forward",
        (parts.sibling(cls, "PixtralMLP"),),
        norm=parts.norm(block.ffn_norm, "layer.ffn_norm", norm),
    )
    dim = block.attention_norm.weight.shape[0]
    return BlockSpec(dim, (attention,), (mlp,), block=block, name="layer")


class CompressedPixtral(CompressedHfModel):
    """A model with a compressor."""

    blocks_name = "transformer.layers"

    def _layout(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        **options: Any,
    ) -> PackedLayout:
        _, _, height, width = pixel_values.shape
        sizes = [(height, width)] * len(pixel_values)
        if image_sizes is not None:
            sizes = read_sizes(image_sizes, sizes)
        patch = self.patch_size
        return PackedLayout(PackedGrids([(rows // patch, cols // patch) for rows, cols in sizes]))


@torch.compiler.disable(reason="the grids are values of image_sizes")
def read_sizes(
    given: torch.Tensor | list[tuple[int, int]], padded: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the sizes of images without padding, in px.

    On a CUDA device the host waits for them, as in the original.

    Args:
        given: ``image_sizes (B, 2)``.
        padded: Those with padding, which none exceeds.
    """
    given = given.tolist() if isinstance(given, torch.Tensor) else given
    return [
        (min(int(height), rows), min(int(width), cols))
        for (height, width), (rows, cols) in zip(given, padded, strict=False)
    ]


class CoarsePixtralLayer(CoarsePackedLayer):
    """A layer after the compressor."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in the layer's class, with mask and positions of the merged tokens."""
        merged = self._merged_layout(hidden_states)
        lengths = [height * width for height, width in merged.grids]
        if attention_mask is not None:
            make = parts.sibling(body_class(self), "generate_block_attention_mask")
            attention_mask = self._derived(
                hidden_states, attention_mask, lambda _: make(lengths, hidden_states)
            )
        if "cu_seq_lens_q" in kwargs:  # for flash attention, instead of a mask
            starts, longest = merged.grids.cu_seqlens(hidden_states.device), max(lengths)
            kwargs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            kwargs |= {"max_length_q": longest, "max_length_k": longest}
        positions = self._merged_positions(hidden_states, position_embeddings)
        return super().forward(
            hidden_states, attention_mask, position_embeddings=positions, **kwargs
        )


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_understood(vit, config, "transformer.layers", "AttentionLayer", "Transformer")


FAMILY = Family(
    CompressedPixtral,
    CompressedPackedLayer,
    CoarsePixtralLayer,
    check,
    packed=PackedAlready,
)
