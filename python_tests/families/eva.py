# SPDX-License-Identifier: Apache-2.0
"""timm's Eva, with its kinds of attention, MLP, norm and position."""

from functools import partial

from rope_by_hand import ROUNDINGS, run_blocks
from timm.layers import RmsNorm
from timm.models.eva import Eva

from families.case import Case, randomise

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
ROPE = {"use_rot_pos_emb": True}
DINOV3 = {
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "num_reg_tokens": 4,
    "init_values": 0.3,
    "use_abs_pos_emb": False,
    "qkv_bias": False,
}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "ref_feat_shape": (4, 4)}
PERCEPTION_ENCODER = {
    "img_size": (20, 36),
    "attn_type": "rope",
    "rope_grid_indexing": "xy",
    "rope_grid_offset": 1.0,
    "use_pre_transformer_norm": True,
    "global_pool": "map",
    "class_token": False,
}
SAPIENS2 = {
    **DINOV3,
    "img_size": (32, 24),
    "attn_type": "rope",
    "num_heads": 4,
    "num_kv_heads": (4, 2, 1, 4),
    "qkv_fused": False,
    "qk_norm": True,
    "attn_only_layer_scale": True,
    "norm_layer": partial(RmsNorm, eps=1e-6),
    "swiglu_mlp": True,
    "swiglu_align_to": 8,
    "rope_rescale_coords": 2.0,
}


def make(**options):
    return randomise(Eva(**{**SIZE, "num_classes": 5, **options}))


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    tokens, rope = model._pos_embed(model.patch_embed(x))
    outs = run_blocks(
        model.blocks,
        model.norm_pre(tokens),
        rope,
        grid,
        model.num_prefix_tokens,
        layer,
        window,
        positions,
        attention,
    )
    return outs, model.norm(outs[-1])


CASES = {
    "Eva": Case(
        make,
        by_hand,
        {
            "odd": {},
            "even": {"img_size": 32},
            "post-norm": {"use_post_norm": True},
            "packed gate": {"swiglu_mlp": True, "scale_attn_inner": True},
            "layer scale": {"init_values": 0.3, "qkv_bias": False, "global_pool": "token"},
        },
    ),
    "Eva, rotary": Case(
        lambda **options: make(**ROPE, **options),
        by_hand,
        {
            "axial": {},
            "EVA-02": EVA02,
            "post-norm": {"use_post_norm": True, "img_size": 32},
            "perception encoder": PERCEPTION_ENCODER,
            "DINOv3": DINOV3,
            "Sapiens2": SAPIENS2,
        },
        roundings=ROUNDINGS,
    ),
    "Eva, rotary in float64": Case(
        lambda **options: make(**ROPE, attn_type="rope", **options),
        by_hand,
        {
            "mixed": {"rope_type": "mixed", "rope_temperature": 10.0},
            "sections": {
                "rope_type": "mrope",
                "rope_mrope_section": (2, 3, 3),
                "class_token": False,
            },
        },
    ),
    "Eva, any size": Case(
        lambda **options: make(**ROPE, dynamic_img_size=True, **options),
        by_hand,
        sizes=((28, 28), (12, 40), (4, 4), (32, 20)),
        roundings=ROUNDINGS,
    ),
    "Eva, mixed, any size": Case(
        lambda **options: make(**ROPE, dynamic_img_size=True, rope_type="mixed", **options),
        by_hand,
        sizes=((32, 20),),
    ),
}
