# SPDX-License-Identifier: Apache-2.0
"""timm's VisionTransformer with plain blocks, and the distilled one."""

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from families.case import Case, merge_batch, mlp_mean, randomise

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


def make(cls=VisionTransformer, **options):
    return randomise(cls(**{**SIZE, "num_classes": 5, **options}))


def merge(block, tokens, grid, prefix, window, attention):
    """The compressor made of a pre-norm block."""

    def attend(x, present):
        return block.ls1(block.attn(block.norm1(x[None])))[0]

    def mlp(z):
        return block.ls2(mlp_mean(block.norm2, block.mlp, z))

    return merge_batch(tokens, grid, prefix, window, attend if attention else None, mlp)


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    outs = []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index == layer:
            tokens = merge(block, tokens, grid, model.num_prefix_tokens, window, attention)
        outs.append(tokens)
    return outs, model.norm(tokens)


def make_distilled(**options):
    return make(VisionTransformerDistilled, **options)


CASES = {
    "VisionTransformer": Case(
        make,
        by_hand,
        {
            "odd": {},
            "even": {"img_size": 32},
            "not square": {"img_size": (20, 36)},
            "dynamic": {"dynamic_img_size": True, "reg_tokens": 2},
            "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
            "layer scale": {"init_values": 0.3, "reg_tokens": 4, "no_embed_class": True},
            "query and key norm": {"qk_norm": True, "qkv_bias": False},
            "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
            "no biases": {"qkv_bias": False, "proj_bias": False, "pos_embed": "none"},
            "padded, drop path, relu": {
                "dynamic_img_size": True,
                "dynamic_img_pad": True,
                "drop_path_rate": 0.3,
                "act_layer": "relu",
            },
        },
    ),
    "VisionTransformer, any size": Case(
        lambda **options: make(dynamic_img_size=True, **options),
        by_hand,
        sizes=((28, 28), (12, 40), (4, 4), (32, 20)),
    ),
    "VisionTransformerDistilled": Case(make_distilled, by_hand),
}
