# SPDX-License-Identifier: Apache-2.0
"""What models of transformers share that take images of several sizes in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class
from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.adapter import require_methods
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_models import (
    CoarseLayer,
    CompressedHfModel,
    CompressedLayer,
)
from uhd_ops.retrofit.packed import PackedModel
from uhd_ops.retrofit.packed_layout import PackedLayout

Table = tuple[torch.Tensor, torch.Tensor]  # cosines, then sines, each (N, D)


class CompressedPackedLayer(CompressedLayer):
    """Layer ``layer``; every layer is given the rotary embeddings of the patches."""

    def _positions(
        self, layout: PackedLayout, *args: Any, position_embeddings: Table, **kwargs: Any
    ) -> Rotary | None:
        if self.window > 1:
            return None  # what merges several times is pooling, which has no attention
        cos, sin = position_embeddings
        return Rotary(layout.raster(sin)[:, None], layout.raster(cos)[:, None])


class CoarsePackedLayer(CoarseLayer):
    """A layer after the compressor."""

    def _merged_layout(self, hidden_states: torch.Tensor) -> PackedLayout:
        """The layout of the tokens that the layer is given."""
        merged = self._layout_of(hidden_states).merged(self.window)
        merged.check(hidden_states)
        return merged

    def _merged_positions(self, hidden_states: torch.Tensor, fine: Table) -> Table:
        """The rotary embeddings of these tokens, by those of the patches."""
        layout = self._layout_of(hidden_states)
        fine_cos, fine_sin = fine

        def derive(cos: torch.Tensor) -> Table:
            sin, cos = layout.merge_table(fine_sin, cos, self.window, self.positions)
            return cos, sin

        return self._derived(hidden_states, fine_cos, derive)


class PackedAlready(PackedModel):
    """``nn.SliceEncoder`` has nothing to add to these models."""

    @classmethod
    def check(cls, vit: nn.Module) -> None:
        """Refuse it."""
        raise NotImplementedError(
            f"nn.SliceEncoder packs views for models that take one size at a time; "
            f"{type(vit).__name__} takes images of several sizes itself: call it on all views"
        )


# ---- models that are given grid_thw: frames, rows and columns of each image or video -----------


class CompressedGridModel(CompressedHfModel):
    """A model with a compressor; every frame of a video is a grid of its own."""

    blocks_name = "blocks"

    def _layout(self, grid_thw: torch.Tensor, **options: Any) -> PackedLayout:
        return layout_of(
            grid_thw, self._order(), self._merge(), self._windows(), self.config.patch_size
        )

    def _order(self) -> tuple[int, ...]:
        """In which order the patches of a frame are, for PackedLayout."""
        return self._merge()[:1]

    def _merge(self) -> tuple[int, int]:
        """Rows and columns of the tokens after the last block that become one."""
        return self.spatial_merge_size, self.spatial_merge_size


@torch.compiler.disable(reason="the grids are values of grid_thw")
def layout_of(
    grid_thw: torch.Tensor,
    order: tuple[int, ...],
    merge: tuple[int, int],
    windows: list[int],
    patch_size: int,
) -> PackedLayout:
    """Read the grids of images; on a CUDA device, as in the original, the host waits for them.

    Args:
        grid_thw: ``(S, 3)``.
        order: As for PackedLayout.
        merge: Rows and columns of tokens that the model merges after its last block.
        windows: Sides of the windows that became one token after each merge, in patches.
        patch_size: Side of a patch, in px, for the message.

    Raises:
        ValueError: A side is not such that all merges come out even.
    """
    shapes = grid_thw.tolist()
    multiples = [side * windows[-1] for side in merge]
    for index, (_, height, width) in enumerate(shapes):
        if height % multiples[0] or width % multiples[1]:
            sides = " x ".join(str(side) for side in multiples)
            pixels = " x ".join(str(side * patch_size) for side in multiples)
            raise ValueError(
                f"grid_thw must have rows and columns that are multiples of {sides} patches, "
                f"{pixels} px, because windows of {windows[-1]} x {windows[-1]} patches become one "
                f"token, and {merge[0]} x {merge[1]} of these one more; entry {index} has {height} "
                f"x {width} patches. Let the image processor round sizes to these multiples"
            )
    grids = [(height, width) for frames, height, width in shapes for _ in range(frames)]
    layout = PackedLayout(PackedGrids(grids), order)
    for window in windows:  # here, because tracing would stop at it again
        layout.merged(window)
    return layout


class CoarseGridLayer(CoarsePackedLayer):
    """A layer after the compressor."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: Table,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in the layer's class, with starts of sequences and positions of the merged tokens."""
        self._merged_layout(hidden_states)
        # Whatever attends to itself, a frame, a clip or a window, holds whole windows.
        size = self.window**2
        starts = self._derived(hidden_states, cu_seqlens, lambda fine: fine // size)
        return super().forward(
            hidden_states,
            cu_seqlens=starts,
            max_seqlen=None if max_seqlen is None else max_seqlen // size,
            position_embeddings=self._merged_positions(hidden_states, position_embeddings),
            **kwargs,
        )


def read_block(block: nn.Module, attention: str, mlp: str, norm: str | None = None) -> BlockSpec:
    """Return the parts of a pre-norm block with ``norm1``, ``attn``, ``norm2`` and ``mlp``.

    Args:
        block: The block.
        attention: Name of the class of its attention.
        mlp: That of its MLP.
        norm: That of its norms; None for LayerNorm.
    """
    modules.require_own_forward(block, "block")
    cls = body_class(block)
    norm_class = nn.LayerNorm if norm is None else parts.sibling(cls, norm)
    branches = (
        parts.attention(
            block.attn,
            "block.attn",
            parts.sibling(cls, attention),
            norm=parts.norm(block.norm1, "block.norm1", norm_class),
            rotate_half=1,
        ),
        parts.mlp(
            block.mlp,
            "block.mlp",
            (parts.sibling(cls, mlp),),
            norm=parts.norm(block.norm2, "block.norm2", norm_class),
        ),
    )
    return BlockSpec(block.norm1.weight.shape[0], branches[:1], branches[1:], block=block)


def require_blocks(
    vit: nn.Module, config: CompressorConfig, blocks_name: str = "blocks", block: str | None = None
) -> None:
    """Refuse a model whose ``forward`` or whose blocks are not those of its class.

    Args:
        vit: The model.
        config: Options of the insertion.
        blocks_name: Where its blocks are.
        block: Name of their class; None means that of the model, with Block in place of Model.
    """
    cls = next(c for c in type(vit).__mro__ if c.__module__.startswith("transformers.models."))
    require_methods(vit, cls, ("forward",))
    block = f"{cls.__name__.removesuffix('Model')}Block" if block is None else block
    blocks = vit.get_submodule(blocks_name)
    for index in range(config.layers[0], len(blocks)):
        name = f"vit.{blocks_name}.{index}"
        modules.require_exactly(blocks[index], name, (parts.sibling(cls, block),))
        modules.require_own_forward(blocks[index], name)
