# SPDX-License-Identifier: Apache-2.0
"""timm's ``Cait`` with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.cait import Cait

from uhd_ops.retrofit.blocks import CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import CompressedModel, Family, image_layout, require_methods
from uhd_ops.retrofit.timm_vision_transformer import require_patch_embedding

# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_cls", "forward_intermediates")


class CompressedCait(CompressedModel):
    """The methods that a compressed Cait replaces."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """As in the model's class; the patch tokens returned are the merged ones."""
        return self._run(self._layout(x), super().forward_features, x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid."""
        return self._intermediates(
            self._layout(x),
            super().forward_intermediates,
            x,
            indices=indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        return image_layout(self, x, 0)  # the class token joins behind the blocks


def check(vit: Cait, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, Cait, _METHODS)
    require_patch_embedding(vit)


FAMILY = Family(CompressedCait, CompressedBlock, None, check)
