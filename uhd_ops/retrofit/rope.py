# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings as timm hands them to its blocks, inside the compressor and behind it.

timm gives a block one tensor ``rope (..., N, 2 * D)``, ``[sin | cos]``: ``(N, 2 * D)`` for all
heads, ``(H, N, 2 * D)`` for each, and with a batch ``(B, 1 or H, N, 2 * D)``. Everything here comes
from that tensor: the module that made it may draw coordinates at random in training, keep those of
one grid whatever it is asked for, or own the frequencies as parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm import layers
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.positions import Frequencies, Rotary
from uhd_ops.retrofit.adapter import CoarseBlock, CompressedBlock, TokenLayout
from uhd_ops.retrofit.packed import Grid, PackedModel, Tables

# Those that return the tensor described above; the last came with Qwen3's encoder.
ROPES = modules.present(
    layers,
    "RotaryEmbeddingCat",
    "RotaryEmbeddingDinoV3",
    "RotaryEmbeddingMixed",
    "RotaryEmbeddingMRope",
)


def window_rotary(rope: torch.Tensor) -> Rotary:
    """Return ``rope`` for queries ``(B, N, H, D)``, as the compressor has them."""
    by_head = rope.unsqueeze(-2) if rope.dim() == 2 else rope.transpose(-3, -2)
    return Rotary(*by_head.chunk(2, -1))


def merge_rope(
    rope: torch.Tensor, layout: TokenLayout, window: int, positions: str
) -> torch.Tensor:
    """Return ``rope`` for the merged tokens of ``layout``."""
    return torch.cat(layout.merge_table(*rope.chunk(2, -1), window, positions), -1)


def frequencies_of(rope: nn.Module | None) -> Frequencies | None:
    """Return the frequencies of a module whose neighbours may differ by pi or more.

    DINOv3 divides 4 pi by the side of the grid, whatever that is, and the axial kind stretches a
    small grid to the one of pretraining. Those of the other two start at no more than 1 per token.
    """
    if type(rope) is RotaryEmbeddingDinoV3:
        axis = 1 / rope.periods
    elif type(rope) is RotaryEmbeddingCat:
        axis = rope.bands
    else:
        return None
    count = len(axis)
    ratio = (axis / axis[-1:]).repeat(2)  # of rows and columns, in either order
    slowest = torch.full((2 * count,), count - 1, device=axis.device)
    slowest[count:] += count
    if rope.rotate_half:
        return Frequencies(ratio.repeat(2), slowest.repeat(2))
    return Frequencies(ratio.repeat_interleave(2), 2 * slowest.repeat_interleave(2))


def require_rope(vit: nn.Module) -> None:
    """Refuse rotary embeddings of an unknown kind."""
    if vit.rope is not None:
        modules.require_version("timm", "1.0.30", "vit, with rotary embeddings,")
    if vit.rope is not None and type(vit.rope) not in ROPES:
        known = ", ".join(cls.__name__ for cls in ROPES)
        raise NotImplementedError(
            f"vit.rope must be None or one of {known}, got {type(vit.rope).__name__}"
        )


def rope_tables(rope: nn.Module | None, grid: Grid, *, any_size: bool) -> Tables | None:
    """Sine and cosine that a model hands to its blocks for a view of one grid.

    Args:
        rope: One of ``ROPES``, or None.
        grid: Patches of the view.
        any_size: Whether the model takes images of any size. Otherwise ``set_input_size`` makes a
            table for that grid; so does a copy of the module, which shares its parameters.
    """
    if rope is None:
        return None
    # What is drawn anew is made for any shape, except by the one kind that asks for a copy.
    drawn = rope.training and rope.aug_active and type(rope) is not RotaryEmbeddingCat
    if any_size or not hasattr(rope, "feat_shape") or drawn:
        table = rope.get_embed(shape=grid)
    else:
        if tuple(rope.feat_shape) != grid:
            # Tables are made in place. Clones, because a tensor without data takes no deepcopy.
            tensors = {id(p): p for p in rope.parameters()}
            tensors |= {id(b): b.clone() for b in rope.buffers()}
            rope = copy.deepcopy(rope, tensors)
            rope.update_feat_shape(grid)
        table = rope.get_embed()
    return tuple(table.chunk(2, -1))


class RotaryTables(PackedModel):
    """A model of timm with rotary embeddings on packed views."""

    @property
    def per_block(self) -> bool:
        """Whether every block has frequencies of its own."""
        return type(self.vit.rope) is RotaryEmbeddingMixed

    def draws_positions(self) -> bool:
        """In training, where the model scales or shifts the coordinates at random."""
        return self.vit.rope is not None and self.vit.rope.training and self.vit.rope.aug_active

    def frequencies(self) -> Frequencies | None:
        """As for images of one size."""
        return frequencies_of(self.vit.rope)

    def rope(self, grid: Grid) -> Tables | None:
        """Those of a model that takes any size."""
        return rope_tables(self.vit.rope, grid, any_size=True)


class CompressedRopeBlock(CompressedBlock):
    """Block ``layer`` of a model that gives ``rope`` to its blocks."""

    def _positions(
        self, layout: TokenLayout, rope: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Rotary | None:
        return None if rope is None else window_rotary(rope)


class CoarseRopeBlock(CoarseBlock):
    """A block after it, whose ``rope`` is that of the fine grid."""

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the block on merged tokens with the positions of their windows."""
        if rope is not None:
            layout = self._layout_of(x)

            def derive(fine: torch.Tensor) -> torch.Tensor:
                return merge_rope(fine, layout, self.window, self.positions)

            rope = self._derived(x, rope, derive)
        return super().forward(x, rope, *args, **kwargs)
