# SPDX-License-Identifier: Apache-2.0
"""``Qwen2_5_VisionTransformerPretrainedModel`` of transformers (Qwen2.5-VL) with a compressor.

Most of its blocks attend inside windows of 8 x 8 patches (112 px). Behind the compressor these are
where they were in the image, and hold 4 x 4 merged tokens. The tokens lie window by window, and in
2 x 2 blocks inside of them, which the model's own merger merges in front of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.ops.reorder_tokens import reorder_tokens
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families._hf_models import CoarseLayer
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
    """Return the parts of a block: a fused projection, RMSNorms, a gated MLP."""
    return read_block(block, "Qwen2_5_VLVisionAttention", "Qwen2_5_VLMLP", norm="Qwen2_5_VLRMSNorm")


def tokens_across(vit: nn.Module) -> int:
    """Side of an attention window, in tokens of the language model without a compressor."""
    return vit.window_size // vit.spatial_merge_size // vit.patch_size


class CompressedQwen25Vl(CompressedGridModel):
    """A model with a compressor."""

    adapted: ClassVar[Mapping[str, str]] = {"forward": "_without_padding"}

    @classmethod
    def _adapt(cls, method: Callable[..., Any], caller: Callable[..., Any]) -> Callable[..., Any]:
        return can_return_tuple(super()._adapt(method, caller))

    def _order(self) -> tuple[int, ...]:
        merge, across = self.spatial_merge_size, tokens_across(self)
        return (across * merge, merge) if across > 1 else (merge,)

    def _without_padding(self, layout: PackedLayout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call ``forward``, and cut off what :class:`CoarseMerger` has added."""
        output = self._run(layout, method, arguments | {"return_dict": True})
        tokens = layout.grids.merged(self._windows()[-1] * self.spatial_merge_size).num_tokens
        output.pooler_output = output.pooler_output[:tokens]
        return output


class CoarseMerger(CoarseLayer):
    """The merger after the last block.

    The model brings its rows from the order of the windows into raster order, by an index for as
    many rows as there are without a compressor. So it gets that many: those of the merged tokens in
    raster order, zeros behind them, and all in the order that the index undoes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As in the merger's class, with rows for the model to put in order."""
        fine = self._layout_of(x)
        coarse = fine.merged(self.window)
        rows, (side, order) = super().forward(x), _of_rows(coarse)
        rows = reorder_tokens(rows, coarse.grids.merged(side), order_in=order)
        side, order = _of_rows(fine)
        grids = fine.grids.merged(side)
        rows = nn.functional.pad(rows, (0, 0, 0, grids.num_tokens - len(rows)))
        return reorder_tokens(rows, grids, order)


def _of_rows(layout: PackedLayout) -> tuple[int, tuple[int, ...]]:
    """Side of the blocks that become a row, and the order of the rows."""
    *outer, side = layout.order
    return side, tuple(block // side for block in outer)


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood, and windows that do not fit into those of the model.

    Raises:
        ValueError: ``window`` does not divide the attention windows into whole tokens.
    """
    require_blocks(vit, config, "blocks", "Qwen2_5_VLVisionBlock")
    across, window = tokens_across(vit), config.window ** len(config.layers)
    if across % window:
        merged = "" if len(config.layers) == 1 else f" to the power of {len(config.layers)} merges"
        raise ValueError(
            f"window{merged} must divide {across}, the tokens across an attention window of vit "
            f"({vit.window_size} px) that reach the language model, got {config.window}"
        )


FAMILY = Family(
    CompressedQwen25Vl,
    CompressedPackedLayer,
    CoarseGridLayer,
    check,
    heads={"merger": CoarseMerger},
    packed=PackedAlready,
)
