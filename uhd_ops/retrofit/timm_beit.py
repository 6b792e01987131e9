# SPDX-License-Identifier: Apache-2.0
"""timm's ``Beit`` with a compressor.

Blocks add a table of their own, one that the model shares, both or none to their scores.
"""

from __future__ import annotations

import torch
from timm.models import beit
from torch import nn

from uhd_ops.nn.host_block import HostBlock
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


class CompressedBeit(RelativePositionsModel):
    """The methods that a compressed Beit replaces."""

    def no_weight_decay(self) -> set[str]:
        """As in the model's class, which lists the tables; the compressor's is one more."""
        tables = {name for name, _ in self.named_parameters() if ".score_bias." in name}
        return super().no_weight_decay() | tables


class CoarseBeitAttention(CoarsePart):
    """The attention of a block behind the compressor."""

    def _get_rel_pos_bias(self) -> torch.Tensor:
        """``(1, heads, 1 + M, 1 + M)`` for the class token and M merged ones."""
        layout = TokenLayout(*self.window_size, prefix=1)
        index = merge_bias(self.relative_position_index, layout, self.window, self.positions)
        merged = StandIn(
            self,
            window_size=layout.merged(self.window).grid,
            relative_position_index=index,
        )
        return self.body_class._get_rel_pos_bias(merged)


def check(vit: beit.Beit, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, beit.Beit, _METHODS)
    require_patch_embedding(vit)
    require_blocks(vit, config, (beit.Block,), beit.Attention)


def read(vit: beit.Beit, block: nn.Module) -> HostBlock:
    """Read a block together with the bias that the model shares."""
    return read_block(block, shared_bias=vit.rel_pos_bias)


FAMILY = Family(
    CompressedBeit,
    CompressedBlock,
    CoarseBiasBlock,
    check,
    parts={"attn": CoarseBeitAttention},
    read=read,
)
