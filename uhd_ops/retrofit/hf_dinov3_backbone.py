# SPDX-License-Identifier: Apache-2.0
"""``DINOv3ViTBackbone`` of transformers with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from uhd_ops.retrofit.hf_dinov3 import (
    CoarseDinov3Layer,
    CompressedDinov3,
    CompressedDinov3Layer,
    check,
)
from uhd_ops.retrofit.hf_parts import CompressedBackbone
from uhd_ops.retrofit.model import Family


class CompressedDinov3Backbone(CompressedDinov3, CompressedBackbone):
    """The method that a compressed backbone replaces."""

    maps_have_prefix = False

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """As in the model's class; maps of stages behind the layer have the merged grid."""
        return self._feature_maps(self._layout(pixel_values, kwargs), pixel_values, **kwargs)


FAMILY = Family(CompressedDinov3Backbone, CompressedDinov3Layer, CoarseDinov3Layer, check)
