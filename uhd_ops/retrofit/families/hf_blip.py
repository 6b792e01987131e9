# SPDX-License-Identifier: Apache-2.0
"""The vision models of BLIP, BLIP-2, InstructBLIP and its one for videos, with a compressor.

They are of transformers, and built like CLIP's, with one layer for queries, keys and values.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.families._hf_models import CompressedLayer
from uhd_ops.retrofit.families.hf_clip import CompressedClipVisionModel, PackedClip, check
from uhd_ops.retrofit.families.hf_clip import read as read
from uhd_ops.retrofit.packed import Sides


class PackedBlip(PackedClip):
    """A vision model of BLIP on packed views."""

    @classmethod
    def channels(cls, vit: nn.Module) -> int:
        """Channels of a pixel."""
        return vit.embeddings.patch_embedding.in_channels

    def prefix(self) -> torch.Tensor:
        """The class token."""
        embeddings = self.vit.embeddings
        return embeddings.class_embedding + embeddings.position_embedding[:, :1]

    def learned(self) -> torch.Tensor:
        """Without that of the class token."""
        table = self.vit.embeddings.position_embedding[0, 1:]
        return table.unflatten(0, (math.isqrt(len(table)), -1))

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm after the last layer."""
        return self.vit.post_layernorm(prefix), self.vit.post_layernorm(patches)


FAMILY = Family(CompressedClipVisionModel, CompressedLayer, None, check, packed=PackedBlip)
