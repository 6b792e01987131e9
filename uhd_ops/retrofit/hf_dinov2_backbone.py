# SPDX-License-Identifier: Apache-2.0
"""``Dinov2Backbone`` and ``Dinov2WithRegistersBackbone`` of transformers with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from uhd_ops.retrofit.hf_dinov2 import check
from uhd_ops.retrofit.hf_parts import CompressedBackbone, CompressedLayer
from uhd_ops.retrofit.model import Family


class CompressedDinov2Backbone(CompressedBackbone):
    """The method that a compressed backbone replaces."""

    blocks_name = "encoder.layer"

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the model's class; maps of stages behind the layer have the merged grid."""
        embedding = self.embeddings.patch_embeddings.projection
        kwargs["attention_mask"] = attention_mask
        layout = self._image_layout(pixel_values, embedding, kwargs)
        return self._feature_maps(layout, pixel_values, **kwargs)


FAMILY = Family(CompressedDinov2Backbone, CompressedLayer, None, check)
