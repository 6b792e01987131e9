# SPDX-License-Identifier: Apache-2.0
"""timm's NaFlexVit, given images; padded batches have tests of their own."""

import torch
from rope_by_hand import ROUNDINGS, run_blocks
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from families.case import Case, randomise
from families.vision_transformer import merge

CONFIG = {
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "pos_embed_grid_size": None,
    "class_token": True,
    "global_pool": "token",
}
ROPE_KINDS = {
    "axial": {},
    "mixed": {},
    "dinov3": {"rope_rotate_half": True},
    "mrope": {"rope_mrope_section": (0, 4, 4)},
}


def make(img_size=28, **options):
    config = NaFlexVitCfg(**{**CONFIG, **options})
    return randomise(NaFlexVit(config, num_classes=5, img_size=img_size))


def make_with_rope(rope_type="axial", **options):
    return make(rope_type=rope_type, **ROPE_KINDS[rope_type], **options)


def images(model, batch=2, dtype=torch.float32, size=None):
    height, width = size or model.embeds.default_img_size
    return torch.randn(batch, 3, height, width, dtype=dtype)


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    embedded = model._forward_embeds(x, None, None, None)
    tokens, rope = embedded["patches"], embedded["rope_embeds"]
    grid, prefix = (x.shape[-2] // 4, x.shape[-1] // 4), model.num_prefix_tokens
    if isinstance(model.blocks[0], EvaBlock):
        options = (grid, prefix, layer, window, positions, attention)
        outs = run_blocks(model.blocks, tokens, rope, *options)
        return outs, model.norm(outs[-1])
    outs = []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index == layer:
            tokens = merge(block, tokens, grid, prefix, window, attention)
        outs.append(tokens)
    return outs, model.norm(tokens)


SIZES = ((28, 28), (12, 40), (4, 4), (32, 20))
CASES = {
    "NaFlexVit": Case(
        make,
        by_hand,
        {
            "odd": {},
            "even": {"img_size": 32},
            "not square": {"img_size": (20, 36)},
            "registers and attention pool": {
                "class_token": False,
                "reg_tokens": 2,
                "global_pool": "map",
                "init_values": 0.3,
            },
            "average pool": {"class_token": False, "global_pool": "avg", "pre_norm": True},
            "convolution": {"embed_proj_type": "conv", "pos_embed": "factorized"},
            "inner norms": {"scale_mlp_norm": True, "scale_attn_inner_norm": True},
        },
        SIZES,
        images,
    ),
    "NaFlexVit, rotary": Case(
        make_with_rope,
        by_hand,
        {
            **{kind: {"rope_type": kind} for kind in ROPE_KINDS},
            "even": {"img_size": 32},
            "not square": {"img_size": (20, 36), "pos_embed": "none"},
            "gates": {"swiglu_mlp": True, "attn_gated": True},
            "grouped queries": {"num_kv_heads": 1, "qkv_fused": False, "qk_norm": True},
            "eva": {"attn_type": "eva", "attn_only_layer_scale": True, "init_values": 0.3},
        },
        SIZES,
        images,
        roundings=ROUNDINGS,
    ),
}
