# SPDX-License-Identifier: Apache-2.0
"""timm's ``Qwen3VitEncoder`` and the ``Qwen3VitClassifier`` around it, with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.families._timm_encoders import CompressedEncoder, require_encoder
from uhd_ops.retrofit.model import CompressedWrapper, Family, encoder_or_self
from uhd_ops.retrofit.rope import CoarseRopeBlock, CompressedRopeBlock


class CompressedQwen3Encoder(CompressedEncoder):
    """The methods that a compressed encoder replaces; its merger takes merged tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As in the model's class, of merged tokens."""
        self.check_merger(x)
        return super().forward(x)

    def check_merger(self, x: torch.Tensor) -> None:
        """Refuse images whose merged tokens the merger cannot merge once more."""
        if self.merger is None:
            return
        window, factor = self._windows()[-1], self.merger.merge_size
        layout = self._layout(x)
        merged = layout.merged(window)
        if merged.height % factor or merged.width % factor:
            raise ValueError(
                f"x must be images whose merged grid has sides divisible by {factor}, which "
                f"vit.merger merges once more; got {layout.height} x {layout.width} patches, "
                f"merged by {window} to {merged.height} x {merged.width}"
            )


class CompressedQwen3Classifier(CompressedWrapper):
    """The method that a classifier around it replaces."""

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid."""
        if not intermediates_only:
            self.encoder.check_merger(x)
        return super().forward_intermediates(
            x,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )


def check(vit: nn.Module, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_encoder(vit, Qwen3VitEncoder, Qwen3VitClassifier)


FAMILY = Family(
    CompressedQwen3Encoder,
    CompressedRopeBlock,
    CoarseRopeBlock,
    check,
    transformer=encoder_or_self,
    wrapper=CompressedQwen3Classifier,
)
