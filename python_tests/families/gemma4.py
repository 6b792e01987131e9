# SPDX-License-Identifier: Apache-2.0
"""timm's Gemma 4 encoder, and the classifier around it."""

import torch
from rope_by_hand import merge_rope
from timm.models.gemma4_vit import Gemma4ClippableLinear, Gemma4VitClassifier, Gemma4VitEncoder

from families.case import Case, merge_batch, randomise, tiled_norm

SIZE = {
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "position_embedding_size": 24,
}


def make(cls=Gemma4VitEncoder, img_size=28, **options):
    model = randomise(cls(**{**SIZE, **options}))
    model.image_size = (img_size, img_size) if isinstance(img_size, int) else img_size
    for module in model.modules():
        if isinstance(module, Gemma4ClippableLinear) and module.use_clipped:
            for name, limit in (("input_min", -0.8), ("input_max", 0.7)):
                getattr(module, name).fill_(limit)
            for name, limit in (("output_min", -0.5), ("output_max", 0.6)):
                getattr(module, name).fill_(limit)
    return model


def make_encoder(**options):
    # The soft pooler, which refuses odd grids, has tests of its own.
    return make(**{"global_pool": "avg", **options})


def make_classifier(**options):
    return make(Gemma4VitClassifier, **{"num_classes": 5, **options})


def encoder_of(model):
    return getattr(model, "encoder", model)


def images(model, batch=2, dtype=torch.float32, size=None):
    return torch.rand(batch, 3, *(size or model.image_size), dtype=dtype)


def merge(block, tokens, grid, window, attention, sin, cos):
    """The compressor made of a block with a norm in front of each branch and one behind it."""

    def attend(x, present):
        rows = (cos[:1, present], sin[:1, present])
        return block.norm2(block.attn(block.norm1(x[None]), *rows))[0]

    def mlp(z):
        z, down = tiled_norm(block.norm3, z), block.mlp.down_proj
        hidden = block.mlp.act(block.mlp.gate_proj(z)) * block.mlp.up_proj(z)
        if not down.use_clipped:
            return block.norm4(down(hidden).mean(0))
        mean = hidden.clamp(down.input_min, down.input_max).mean(0)
        return block.norm4(down.linear(mean).clamp(down.output_min, down.output_max))

    return merge_batch(tokens, grid, 0, window, attend if attention else None, mlp)


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    encoder = encoder_of(model)
    grid = (x.shape[-2] // 4, x.shape[-1] // 4)
    tokens, coordinates, _ = encoder.patch_embed(x)
    cos, sin = encoder.rotary_emb(tokens, coordinates)
    merged = merge_rope(torch.cat([sin, cos], -1), grid, window, positions)
    outs = []
    for index, block in enumerate(encoder.blocks):
        if index <= layer:
            tokens = block(tokens, cos, sin)
        else:
            tokens = block(tokens, *reversed(merged.chunk(2, -1)))
        if index == layer:
            tokens = merge(block, tokens, grid, window, attention, sin, cos)
        outs.append(tokens)
    return outs, tokens


def run_block(model, index, x):
    encoder = encoder_of(model)
    coordinates = torch.arange(x.shape[1])[None, :, None].expand(1, -1, 2)
    return encoder.blocks[index](x, *encoder.rotary_emb(x, coordinates))


VARIANTS = {
    "odd": {},
    "even": {"img_size": 32},
    "not square": {"img_size": (20, 36)},
    "clamps": {"use_clipped_linears": True},
    "grouped queries": {"num_kv_heads": 1},
}
OPTIONS = {"images": images, "num_prefix": lambda model: 0, "run_block": run_block}
CASES = {
    "Gemma4VitEncoder": Case(
        make_encoder, by_hand, VARIANTS, ((28, 28), (12, 40), (4, 4), (32, 20)), **OPTIONS
    ),
    "Gemma4VitClassifier": Case(
        make_classifier,
        by_hand,
        {"odd": {}, "clamps": {"use_clipped_linears": True}},
        blocks="encoder.blocks",
        **OPTIONS,
    ),
}
