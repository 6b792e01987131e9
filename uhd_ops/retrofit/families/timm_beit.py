# SPDX-License-Identifier: Apache-2.0
"""timm's ``Beit`` with a compressor.

Blocks add a table of their own, one that the model shares, both or none to their scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models import beit
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.score_bias import RelativePositionBias
from uhd_ops.retrofit.adapter import (
    CoarsePart,
    CompressedBlock,
    CompressedModel,
    Family,
    TokenLayout,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid
from uhd_ops.retrofit.relative_positions import (
    CoarseBiasBlock,
    PackedRelativePositions,
    StandIn,
    merge_bias,
    relative_index,
    require_blocks,
    resize_table,
)

_TENSORS = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index")


def read(block: nn.Module, shared_bias: nn.Module | None = None) -> BlockSpec:
    """Return the parts of a ``Block``: pre-norm, with relative positions.

    Args:
        block: The block.
        shared_bias: The model's ``rel_pos_bias``, which adds to the block's own.
    """
    modules.require_own_forward(block, "block")
    attention = _attention(block.attn, shared_bias, **parts.around(block, 1, "gamma_"))
    mlp = parts.mlp(block.mlp, "block.mlp", **parts.around(block, 2, "gamma_"))
    return BlockSpec(block.attn.qkv.in_features, (attention,), (mlp,), block=block)


def _attention(module: nn.Module, shared_bias: nn.Module | None, **branch: object) -> AttentionSpec:
    name = "block.attn"
    modules.require_exactly(module, name, (beit.Attention,))
    modules.require_plain(module, name, _TENSORS)
    head_dim = module.qkv.out_features // (3 * module.num_heads)
    parts.check_scale(module, name, head_dim)
    return AttentionSpec(
        module.num_heads,
        (module.qkv if module.q_bias is None else parts.biased(module),),
        module.proj,
        head_dim,
        score_bias=_score_bias(module, shared_bias),
        attention_dropout=modules.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=modules.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def _score_bias(
    module: nn.Module, shared_bias: nn.Module | None
) -> Callable[[int], RelativePositionBias] | None:
    """Make the sum of both biases, each of which may be missing."""
    sources = []
    if module.relative_position_bias_table is not None:
        sources.append((module._get_rel_pos_bias, module.window_size))
    if shared_bias is not None:
        modules.require_exactly(shared_bias, "vit.rel_pos_bias", (beit.RelativePositionBias,))
        sources.append((shared_bias, shared_bias.window_size))
    if not sources:
        return None

    def make(window: int) -> RelativePositionBias:
        total = sum(source() for source, _ in sources)
        return RelativePositionBias.from_grid(total.view(-1, *total.shape[-2:]), grid, window)

    _, grid = sources[0]
    return make


_METHODS = ("forward", "forward_features", "forward_intermediates")


class CompressedBeit(CompressedModel):
    """The methods that a compressed Beit replaces."""

    def no_weight_decay(self) -> set[str]:
        """As in the model's class, which lists the tables; the compressor's is one more."""
        tables = {name for name, _ in self.named_parameters() if ".score_bias." in name}
        return super().no_weight_decay() | tables


class CoarseBeitAttention(CoarsePart):
    """The attention of a block after the compressor."""

    def _get_rel_pos_bias(self) -> torch.Tensor:
        """``(1, heads, 1 + M, 1 + M)`` for the class token and M merged ones."""
        layout = TokenLayout(*self.window_size, prefix=1)
        index = merge_bias(self.relative_position_index, layout, self.window, self.positions)
        merged = StandIn(
            self,
            window_size=layout.merged(self.window)[:2],
            relative_position_index=index,
        )
        return self.body_class._get_rel_pos_bias(merged)


def check(vit: beit.Beit, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, beit.Beit, _METHODS)
    parts.require_patch_embedding(vit)
    require_blocks(vit, config, (beit.Block,), beit.Attention)


def score_bias(module: nn.Module, grid: Grid, window: int, positions: str) -> torch.Tensor:
    """Bias of an ``Attention`` or a ``RelativePositionBias`` for the merged tokens of a view.

    Args:
        module: Has a table of offsets, which is resized as ``set_input_size`` does.
        grid: Patches ``(h, w)`` of the view.
        window: Side of the windows that became one token, in patches.
        positions: ``"center"`` or ``"reindex"``.

    Returns:
        ``(heads, 1 + m, 1 + m)``
    """
    table = module.relative_position_bias_table
    index = relative_index(grid, window, positions, 1, table.device)
    return resize_table(table, module.window_size, grid)[index].permute(2, 0, 1)


class PackedBeit(PackedRelativePositions, parts.PackedVisionTransformer):
    """A Beit on packed views."""

    methods = ("forward_features",)
    score_names = ("rel_pos_bias",), ("attn.relative_position_bias_table",)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout."""
        return self.vit.pos_drop(x)

    def bias(self, attn: nn.Module, grid: Grid, window: int) -> Callable | torch.Tensor | None:
        """Its own, what the model shares, or their sum."""
        shared, source = None, self.vit.rel_pos_bias
        if source is not None:
            shared = self.once(score_bias, source, grid, window, self.merged_positions)
        if attn.relative_position_bias_table is None:
            return shared

        def own(q: torch.Tensor) -> torch.Tensor:
            bias = score_bias(attn, grid, window, self.merged_positions)
            return bias if shared is None else bias + shared

        return own


def read_in_model(vit: beit.Beit, block: nn.Module) -> BlockSpec:
    """Read a block together with the bias that the model shares."""
    return read(block, vit.rel_pos_bias)


FAMILY = Family(
    CompressedBeit,
    CompressedBlock,
    CoarseBiasBlock,
    check,
    parts={"attn": CoarseBeitAttention},
    read=read_in_model,
    packed=PackedBeit,
)
