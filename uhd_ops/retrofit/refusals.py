# SPDX-License-Identifier: Apache-2.0
"""Why models of other classes take no compressor, where that is known."""

from __future__ import annotations

from torch import nn

_REASONS = {
    "timm.models.convit.ConVit": "its positional attention takes square grids only",
    "timm.models.crossvit.CrossVit": "two branches of different patch sizes exchange their tokens",
    "timm.models.mlp_mixer.MlpMixer": "it mixes tokens by weights for a fixed number of them",
    "timm.models.pit.PoolingVisionTransformer": "it pools its tokens between stages already",
    "timm.models.tnt.TNT": "every patch token is tied to a sequence of pixel tokens",
    "timm.models.volo.VOLO": "it reduces its tokens behind the outlook attention already",
    "timm.models.xcit.Xcit": "it attends between channels and convolves the patch grid",
    "transformers.models.siglip2.modeling_siglip2.Siglip2ForImageClassification": (
        "its classifier averages over the patches that pixel_attention_mask marks"
    ),
}


def reason(vit: nn.Module) -> str | None:
    """Say why a model takes no compressor; None where nothing is known of its class."""
    for name in class_names(vit):
        if name in _REASONS:
            return _REASONS[name]
    info = getattr(vit, "feature_info", None)
    if isinstance(info, list) and len({stage.get("reduction") for stage in info}) > 1:
        return "its stages reduce the resolution already"
    return None


def class_names(module: nn.Module) -> list[str]:
    """The class of a module and those that it extends, with the modules that define them."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
