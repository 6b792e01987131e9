# SPDX-License-Identifier: Apache-2.0
"""timm's encoders of Qwen3 and DeepSeek, which return ``(B, h, w, C)``, and their classifiers."""

import torch
from rope_by_hand import ROUNDINGS, run_blocks
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from families.case import Case, randomise

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


def encoder_of(model):
    return getattr(model, "encoder", model)


def images(model, batch=2, dtype=torch.float32, size=None):
    height, width = size or encoder_of(model).patch_embed.img_size
    return torch.randn(batch, 3, height, width, dtype=dtype)


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    encoder = encoder_of(model)
    patches = encoder.patch_embed(x)
    grid = patches.shape[1:3]
    tokens, rope = encoder._pos_embed(patches)
    outs = run_blocks(encoder.blocks, tokens, rope, grid, 0, layer, window, positions, attention)
    features = getattr(encoder, "norm", nn.Identity())(outs[-1])
    features = features.unflatten(1, [-(-side // window) for side in grid])
    if encoder is not model:
        for projector in ("merger", "aligner"):
            projector = getattr(encoder, projector, None)
            features = features if projector is None else projector(features)
    return outs, features


def run_block(model, index, x):
    return encoder_of(model).blocks[index](x)


# DeepSeek's RMSNorms work in float32: two in each block, two in the compressor, one at the end.
NORM_ROUNDINGS = 11 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps


def case(cls, variants, sizes=(), roundings=ROUNDINGS, blocks="blocks", **options):
    return Case(
        lambda **own: randomise(cls(**{**SIZE, **options, **own})),
        by_hand,
        variants,
        sizes,
        images,
        blocks,
        run_block=run_block,
        roundings=roundings,
    )


QWEN3 = {"pos_embed_grid_size": 5, "out_features": 12}
DEEPSEEK = {"out_features": 12, "roundings": ROUNDINGS + NORM_ROUNDINGS}
GRIDS = {"odd": {}, "even": {"img_size": 32}, "not square": {"img_size": (20, 36)}}
SIZES = ((28, 28), (12, 40), (4, 4), (32, 20))
CASES = {
    "Qwen3VitEncoder": case(Qwen3VitEncoder, GRIDS, SIZES, **QWEN3),
    "Qwen3VitClassifier": case(
        Qwen3VitClassifier,
        {"mean": {}, "merger": {"img_size": 32, "encoder_pool": "merge"}},
        blocks="encoder.blocks",
        num_classes=5,
        **QWEN3,
    ),
    "DeepseekVitEncoder": case(
        DeepseekVitEncoder, GRIDS, (*SIZES, (27, 33)), dynamic_img_pad=True, **DEEPSEEK
    ),
    "DeepseekVitClassifier": case(
        DeepseekVitClassifier,
        {"mean": {}, "aligner": {"encoder_pool": "align"}},
        blocks="encoder.blocks",
        num_classes=5,
        **DEEPSEEK,
    ),
}
