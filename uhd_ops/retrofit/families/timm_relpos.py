# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformerRelPos`` with a compressor.

Blocks have a bias of their own, from a table or an MLP, or one that the model shares. A block with
its own ignores the shared one, as it did before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timm import layers
from timm.models import vision_transformer_relpos as relpos
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class, clone_module
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


def read(block: nn.Module, shared_bias: nn.Module | None = None) -> BlockSpec:
    """Return the parts of a ``RelPosBlock``, pre-norm, or of a ``ResPostRelPosBlock``, post-norm.

    Args:
        block: The block.
        shared_bias: The model's ``shared_rel_pos``; used by blocks that have no bias of their own.
    """
    modules.require_own_forward(block, "block")
    post_norm = not hasattr(block, "ls1")
    around = functools.partial(parts.around, block, scale="ls", post_norm=post_norm)
    bias = shared_bias if block.attn.rel_pos is None else block.attn.rel_pos
    attention = parts.attention(
        block.attn,
        "block.attn",
        (relpos.RelPosAttention,),
        score_bias=None if bias is None else functools.partial(_score_bias, bias),
        **around(1),
    )
    mlp = parts.mlp(block.mlp, "block.mlp", **around(2))
    return BlockSpec(block.attn.qkv.in_features, (attention,), (mlp,), block=block)


def _score_bias(bias: nn.Module, window: int) -> RelativePositionBias:
    """The bias inside a window, as a table: what it is computed from depends on the whole grid."""
    modules.require_exactly(bias, "rel_pos", (layers.RelPosBias, layers.RelPosMlp))
    with torch.no_grad():
        scores = clone_module(bias).eval().get_bias()[0]  # RelPosMlp has dropout
    return RelativePositionBias.from_grid(scores, bias.window_size, window)


_METHODS = ("forward", "forward_features", "forward_intermediates")


class CoarseRelPos(CoarsePart):
    """A ``RelPosBias`` or ``RelPosMlp`` of a block after the compressor."""

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


def score_bias(module: nn.Module, grid: Grid, window: int, positions: str) -> torch.Tensor:
    """Bias of a ``RelPosBias`` or ``RelPosMlp`` for the merged tokens of a view.

    Args:
        module: Has a table of offsets, which is resized as ``set_input_size`` does, or an MLP.
        grid: Patches ``(h, w)`` of the view.
        window: Side of the windows that became one token, in patches.
        positions: ``"center"`` or ``"reindex"``.

    Returns:
        ``(heads, P + m, P + m)``
    """
    device = module.relative_position_index.device
    heads, own = module.bias_shape[-1], {}
    if isinstance(module, layers.RelPosBias):
        prefix, table = module.prefix_tokens, module.relative_position_bias_table
        own["relative_position_bias_table"] = resize_table(table, module.window_size, grid)
    else:
        prefix = 0  # the model adds 0 for prefix tokens
        own["rel_coords_log"] = layers.gen_relative_log_coords(
            grid,
            module.pretrained_window_size,
            mode=module.mode,
            device=device,
            dtype=module.rel_coords_log.dtype,
        )
    index = relative_index(grid, window, positions, prefix, device)
    own["relative_position_index"] = index.flatten()
    return body_class(module).get_bias(StandIn(module, bias_shape=(*index.shape, heads), **own))[0]


class PackedRelPos(PackedRelativePositions, parts.PackedTimm):
    """A VisionTransformerRelPos on packed views."""

    methods = ("forward_features",)
    score_names = ("shared_rel_pos",), ("attn.rel_pos",)

    def prefix(self) -> torch.Tensor | None:
        """The class token."""
        return self.vit.cls_token

    def bias(self, attn: nn.Module, grid: Grid, window: int) -> Callable | torch.Tensor | None:
        """Its own or else, what the model shares."""
        own, source, positions = attn.rel_pos, self.vit.shared_rel_pos, self.merged_positions
        if own is not None:
            return lambda q: score_bias(own, grid, window, positions)
        return None if source is None else self.once(score_bias, source, grid, window, positions)


def check(vit: relpos.VisionTransformerRelPos, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, relpos.VisionTransformerRelPos, _METHODS)
    parts.require_patch_embedding(vit)
    classes = (relpos.RelPosBlock, relpos.ResPostRelPosBlock)
    require_blocks(vit, config, classes, relpos.RelPosAttention)
    allowed = (layers.RelPosBias, layers.RelPosMlp)
    first = config.layers[0]
    for index, block in enumerate(vit.blocks[first:], first):
        if block.attn.rel_pos is not None:
            name = f"vit.blocks.{index}.attn.rel_pos"
            modules.require_exactly(block.attn.rel_pos, name, allowed)


def read_in_model(vit: relpos.VisionTransformerRelPos, block: nn.Module) -> BlockSpec:
    """Read a block together with the bias that the model shares."""
    return read(block, vit.shared_rel_pos)


FAMILY = Family(
    CompressedModel,
    CompressedBlock,
    CoarseBiasBlock,
    check,
    parts={"attn.rel_pos": CoarseRelPos},
    read=read_in_model,
    packed=PackedRelPos,
)
