# SPDX-License-Identifier: Apache-2.0
"""``Qwen3VLVisionModel`` of transformers (Qwen3-VL) and its relatives with a compressor.

As in Qwen2-VL, the merged tokens of a frame come in 2 x 2 blocks, which the model's merger merges
again. So do the mergers of intermediate features (deepstack) from the compressor on. Those in front
of it merge 2 x 2 patches as before, and what they return is averaged over the compressor's windows,
so that all features have one token for each token of the output.

``Qwen3VLMoeVisionModel`` is the same; ``Qwen3_5VisionModel`` and ``Qwen3_5MoeVisionModel`` are too,
but have no deepstack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.utils.generic import can_return_tuple

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families._hf_packed import (
    CoarseGridLayer,
    CompressedGridModel,
    CompressedPackedLayer,
    PackedAlready,
    read_block,
    require_blocks,
)
from uhd_ops.retrofit.packed_layout import PackedLayout


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a block: a fused projection, LayerNorms."""
    vision = body_class(block).__name__.removesuffix("Block")
    return read_block(block, f"{vision}Attention", f"{vision}MLP")


class CompressedQwen3Vl(CompressedGridModel):
    """A model with a compressor."""

    adapted: ClassVar[Mapping[str, str]] = {"forward": "_with_deepstack"}

    @classmethod
    def _adapt(cls, method: Callable[..., Any], caller: Callable[..., Any]) -> Callable[..., Any]:
        return can_return_tuple(super()._adapt(method, caller))

    def _with_deepstack(self, layout: PackedLayout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call ``forward``; average what comes from blocks in front of a merge over its windows."""
        output = self._run(layout, method, arguments | {"return_dict": True})
        sides, layers = self._windows(), self.compression.layers
        # The features come in this order.
        indices = sorted(getattr(self, "deepstack_visual_indexes", ()))
        for place, index in enumerate(indices):
            side = sides[sum(layer <= index for layer in layers)]
            if side < sides[-1]:
                grids = layout.grids.merged(side * self.spatial_merge_size)
                features = output.deepstack_features
                features[place] = window_mean(features[place], grids, sides[-1] // side)
        return output


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_blocks(vit, config)


FAMILY = Family(
    CompressedQwen3Vl, CompressedPackedLayer, CoarseGridLayer, check, packed=PackedAlready
)
