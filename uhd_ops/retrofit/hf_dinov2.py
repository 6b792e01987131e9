# SPDX-License-Identifier: Apache-2.0
"""DINOv2 of transformers, with registers or without, with a compressor.

``Dinov2Model`` and ``Dinov2WithRegistersModel``, and the classifiers made of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.hf_parts import (
    CompressedHfModel,
    CompressedLayer,
    HfWrapper,
    require_understood,
)
from uhd_ops.retrofit.model import Family


class CompressedDinov2Model(CompressedHfModel):
    """The method that a compressed model replaces."""

    blocks_name = "encoder.layer"

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the model's class; tokens and hidden states behind the layer are merged ones."""
        embedding = self.embeddings.patch_embeddings.projection
        kwargs["attention_mask"] = attention_mask
        layout = self._image_layout(pixel_values, embedding, kwargs)
        return self._run(layout, super().forward, pixel_values, bool_masked_pos, **kwargs)


def transformer(vit: nn.Module) -> nn.Module:
    """Return the model that a classifier is made of."""
    return getattr(vit, vit.base_model_prefix, vit)


def check(vit: nn.Module, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_understood(transformer(vit), config, "encoder.layer")


FAMILY = Family(
    CompressedDinov2Model,
    CompressedLayer,
    None,
    check,
    transformer=transformer,
    wrapper=HfWrapper,
)
