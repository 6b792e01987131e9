# SPDX-License-Identifier: Apache-2.0
"""timm's ``Qwen3VitEncoder`` and the ``Qwen3VitClassifier`` around it, with a compressor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models.qwen3_vit import (
    Qwen3VitClassifier,
    Qwen3VitEncoder,
    resample_pos_embed_grid,
)
from torch import nn

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.adapter import CompressedWrapper, Family, TokenLayout, encoder_or_self
from uhd_ops.retrofit.families._timm_encoders import (
    CompressedEncoder,
    PackedEncoder,
    require_encoder,
)
from uhd_ops.retrofit.packed import Grid
from uhd_ops.retrofit.rope import CoarseRopeBlock, CompressedRopeBlock


class CompressedQwen3Encoder(CompressedEncoder):
    """An encoder whose merger takes merged tokens."""

    adapted: ClassVar[Mapping[str, str]] = CompressedEncoder.adapted | {"forward": "_forward"}

    def _forward(self, layout: TokenLayout, method: Any, arguments: dict[str, Any]) -> Any:
        self.check_merger(layout)
        return method(**arguments)

    def check_merger(self, layout: TokenLayout) -> None:
        """Refuse images whose merged tokens the merger cannot merge once more."""
        if self.merger is None:
            return
        factor, merged = self.merger.merge_size, self._behind(layout)
        if merged.height % factor or merged.width % factor:
            raise ValueError(
                f"x must be images whose merged grid has sides divisible by {factor}, which "
                f"vit.merger merges once more; got {layout.height} x {layout.width} patches, "
                f"merged by {self._windows()[-1]} to {merged.height} x {merged.width}"
            )


class CompressedQwen3Classifier(CompressedWrapper):
    """A classifier around it."""

    adapted: ClassVar[Mapping[str, str]] = {"forward_intermediates": "_intermediates"}

    def _layout(self, **arguments: Any) -> TokenLayout:
        return self.encoder._layout(**arguments)

    def _intermediates(self, layout: TokenLayout, method: Any, arguments: dict[str, Any]) -> Any:
        if not arguments["intermediates_only"]:
            self.encoder.check_merger(layout)
        return method(**arguments)


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    require_encoder(vit, Qwen3VitEncoder, Qwen3VitClassifier)


class PackedQwen3Encoder(PackedEncoder):
    """An encoder on packed views."""

    def absolute(self, grid: Grid) -> torch.Tensor:
        """Resampled as the encoder does: bilinear, with corners aligned."""
        vit = self.vit
        return resample_pos_embed_grid(vit.pos_embed, vit.pos_embed_grid_size, grid)[0]

    def learned(self) -> torch.Tensor:
        """The whole table."""
        return self.vit.pos_embed[0].unflatten(0, (self.vit.pos_embed_grid_size, -1))


FAMILY = Family(
    CompressedQwen3Encoder,
    CompressedRopeBlock,
    CoarseRopeBlock,
    check,
    transformer=encoder_or_self,
    wrapper=CompressedQwen3Classifier,
    packed=PackedQwen3Encoder,
)
