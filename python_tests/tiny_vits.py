# SPDX-License-Identifier: Apache-2.0
"""Small timm models with random weights, one for each feature that the retrofit must survive."""

import copy

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}

# The options by which the families differ; 28 px are 7 x 7 patches, so windows are ragged.
FEATURES = {
    "augreg": {},
    "even grid": {"img_size": 32},
    "siglip": {
        "class_token": False,
        "global_pool": "map",
        "act_layer": "gelu_tanh",
        "num_classes": 0,
    },
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "deit3": {"init_values": 0.3, "no_embed_class": True},
    "dinov2 with registers": {"init_values": 0.3, "reg_tokens": 4, "no_embed_class": True},
    "query and key norm": {"qk_norm": True, "qkv_bias": False},
    "average pool": {"class_token": False, "global_pool": "avg"},
    "dynamic size": {"dynamic_img_size": True, "reg_tokens": 2},
    "dynamic size, padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "no positions": {"pos_embed": "none"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "drop path": {"drop_path_rate": 0.3},
    "relu": {"act_layer": "relu"},
}


def tiny_vit(cls=VisionTransformer, **options):
    """Return a model in evaluation whose every parameter is random, biases and norms included."""
    vit = cls(**{**SIZE, "num_classes": 5, **options}).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return vit


def tiny_distilled(**options):
    """Return a DeiT with a distillation token."""
    return tiny_vit(VisionTransformerDistilled, **options)


def images(vit, batch=2, dtype=torch.float32, size=None):
    """Return random images of the model's size, or of ``size`` (height, width)."""
    height, width = size or vit.patch_embed.img_size
    return torch.randn(batch, 3, height, width, dtype=dtype)


def snapshot(vit):
    """Everything that a user of the model could see of it."""
    return {
        "classes": [(name, type(module)) for name, module in vit.named_modules()],
        "attributes": [(name, set(vars(module))) for name, module in vit.named_modules()],
        "info": copy.deepcopy(vit.feature_info),
        "keys": list(vit.state_dict()),
        "pointers": [p.data_ptr() for p in vit.parameters()],
        "repr": repr(vit),
    }
