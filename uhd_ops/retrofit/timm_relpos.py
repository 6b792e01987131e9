# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformerRelPos`` with a compressor.

Blocks have a bias of their own, from a table or an MLP, or one that the model shares. A block with
its own ignores the shared one, as it did before.
"""

from __future__ import annotations

import torch
from timm import layers
from timm.models import vision_transformer_relpos as relpos
from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import read_block
from uhd_ops.retrofit.blocks import CoarsePart, CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import Family, require_methods
from uhd_ops.retrofit.relative_positions import (
    CoarseBiasBlock,
    RelativePositionsModel,
    StandIn,
    merge_bias,
    require_blocks,
)
from uhd_ops.retrofit.timm_vision_transformer import require_patch_embedding

_METHODS = ("forward", "forward_features", "forward_intermediates")


class CompressedRelPos(RelativePositionsModel):
    """The methods that a compressed VisionTransformerRelPos replaces."""


class CoarseRelPos(CoarsePart):
    """A ``RelPosBias`` or ``RelPosMlp`` of a block behind the compressor."""

    def get_bias(self) -> torch.Tensor:
        """``(1, heads, P + M, P + M)`` for P prefix tokens and M merged ones."""
        fine, _, heads = self.bias_shape
        layout = TokenLayout(*self.window_size, prefix=fine - self.window_area)
        index = self.relative_position_index.view(fine, fine)
        index = merge_bias(index, layout, self.window, self.positions)
        merged = StandIn(
            self, relative_position_index=index.flatten(), bias_shape=(*index.shape, heads)
        )
        return self.body_class.get_bias(merged)


def check(vit: relpos.VisionTransformerRelPos, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, relpos.VisionTransformerRelPos, _METHODS)
    require_patch_embedding(vit)
    classes = (relpos.RelPosBlock, relpos.ResPostRelPosBlock)
    require_blocks(vit, config, classes, relpos.RelPosAttention)
    allowed = (layers.RelPosBias, layers.RelPosMlp)
    first = config.indices[0]
    for index, block in enumerate(vit.blocks[first:], first):
        if block.attn.rel_pos is not None:
            name = f"vit.blocks.{index}.attn.rel_pos"
            checks.require_exactly(block.attn.rel_pos, name, allowed)


def read(vit: relpos.VisionTransformerRelPos, block: nn.Module) -> HostBlock:
    """Read a block together with the bias that the model shares."""
    return read_block(block, shared_bias=vit.shared_rel_pos)


FAMILY = Family(
    CompressedRelPos,
    CompressedBlock,
    CoarseBiasBlock,
    check,
    parts={"attn.rel_pos": CoarseRelPos},
    read=read,
)
