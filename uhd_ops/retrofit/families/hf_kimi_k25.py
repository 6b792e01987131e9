# SPDX-License-Identifier: Apache-2.0
"""``Kimi_K25VisionModel`` of transformers, which is MoonViT, with a compressor.

The patches of a frame come in raster order, and so do the merged tokens; all frames of a video
attend to each other. Windows never reach into another frame. Behind the last layer the model puts
2 x 2 tokens together and averages over the frames of a video, as it does without a compressor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families import _hf_blocks as parts
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
    """Return the parts of a layer: separate projections, LayerNorms."""
    return read_block(block, "Kimi_K25VisionAttention", "Kimi_K25VisionMLP")


class CompressedKimiK25(CompressedGridModel):
    """A model with a compressor."""

    blocks_name = "layers"
    adapted: ClassVar[Mapping[str, str]] = {"forward": "_with_merged_index"}

    def _order(self) -> tuple[int, ...]:
        return ()

    def _merge(self) -> tuple[int, int]:
        return tuple(self.merge_kernel_size)

    def _with_merged_index(
        self, layout: PackedLayout, method: Any, arguments: dict[str, Any]
    ) -> Any:
        """Call ``forward`` with the index of the tokens that it puts together, made anew."""
        side = self._windows()[-1]
        frames, *grid = arguments["grid_thw"].unbind(1)
        merged = torch.stack([frames, *(length // side for length in grid)], 1)
        make = parts.sibling(self.body_class, "get_vision_temporal_merge_index")
        index = make(merged, *self.merge_kernel_size)
        return self._run(layout, method, arguments | {"temporal_merge_index": index})


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_blocks(vit, config, "layers", "Kimi_K25VisionEncoderLayer")


FAMILY = Family(
    CompressedKimiK25, CompressedPackedLayer, CoarseGridLayer, check, packed=PackedAlready
)
