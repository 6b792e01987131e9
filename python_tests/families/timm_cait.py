# SPDX-License-Identifier: Apache-2.0
"""timm's Cait: talking heads, and a class token that joins behind the blocks."""

import torch
from timm.models.cait import Cait

from families.case import Case, merge_batch, mlp_mean, randomise

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}


def make(**options):
    """Without the biases of the second mixing: see test_timm_cait.py for those."""
    model = make_biased(**options)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj_w.bias)
    return model


def make_biased(**options):
    return randomise(Cait(**{**SIZE, "num_classes": 5, **options}))


def talking_heads(attn, x):
    """Attention of the tokens ``(n, C)`` of a window, head by head."""
    q, k, v = (part.chunk(attn.num_heads, -1) for part in attn.qkv(x).chunk(3, -1))
    scores = torch.stack([q @ k.T for q, k in zip(q, k, strict=True)]) / q[0].shape[-1] ** 0.5
    mixed = [
        sum(w * s for w, s in zip(row, scores, strict=True)) + bias
        for row, bias in zip(attn.proj_l.weight, attn.proj_l.bias, strict=True)
    ]
    weights = [scores.softmax(-1) for scores in mixed]
    mixed = [
        sum(w * s for w, s in zip(row, weights, strict=True)) + bias
        for row, bias in zip(attn.proj_w.weight, attn.proj_w.bias, strict=True)
    ]
    return attn.proj(torch.cat([w @ v for w, v in zip(mixed, v, strict=True)], -1))


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    tokens, outs = model.patch_embed(x) + model.pos_embed, []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index == layer:
            tokens = merge(block, tokens, grid, window, attention)
        outs.append(tokens)
    cls = model.cls_token.expand(len(x), -1, -1)
    for block in model.blocks_token_only:
        cls = block(tokens, cls)
    return outs, model.norm(torch.cat([cls, tokens], 1))


def merge(block, tokens, grid, window, attention):
    def attend(x, present):
        return block.gamma_1 * talking_heads(block.attn, block.norm1(x))

    def mlp(z):
        return block.gamma_2 * mlp_mean(block.norm2, block.mlp, z)

    return merge_batch(tokens, grid, 0, window, attend if attention else None, mlp)


CASES = {
    "Cait": Case(
        make,
        by_hand,
        {
            "odd": {},
            "even": {"img_size": 32},
            "not square": {"img_size": (20, 36), "global_pool": "avg"},
            "no bias": {"qkv_bias": False},
        },
        num_prefix=lambda model: 0,
    ),
}
