# SPDX-License-Identifier: Apache-2.0
"""What models of transformers share that take images of several sizes in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.families._hf_models import CoarseLayer, CompressedLayer
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
    """A layer behind the compressor."""

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
