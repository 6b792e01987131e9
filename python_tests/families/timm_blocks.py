# SPDX-License-Identifier: Apache-2.0
"""timm's VisionTransformer with its other blocks, attentions, MLPs, norms and patch embeddings."""

import functools

import torch
from timm.layers import GluMlp, HybridEmbed, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vitamin import GeGluMlp
from torch import nn
from torch.nn import functional

from families import vision_transformer
from families.case import Case, merge_batch, mlp_mean, tiled_norm
from families.vision_transformer import make


def residual_post_norm(block):
    def attend(x, present):
        return block.norm1(block.attn(x[None]))[0]

    def mlp(z):
        return block.norm2(mlp_mean(None, block.mlp, z))

    return attend, mlp


def parallel_things(block):
    def attend(x, present):
        return sum(part.ls(part.attn(part.norm(x[None])))[0] for part in block.attns)

    def mlp(z):
        return sum(part.ls(mlp_mean(part.norm, part.mlp, z)) for part in block.ffns)

    return attend, mlp


def parallel_scaling(block):
    """Attention and MLP of the block, each on its own, with its packed weights taken apart."""
    hidden, dim = block.in_split[:2]
    if getattr(block, "attn_out_proj", None) is None:
        proj, fc2 = block.out_proj.weight[:, :dim], block.out_proj.weight[:, dim:]
        proj_bias, fc2_bias = None, block.out_proj.bias
    else:
        proj, proj_bias = block.attn_out_proj.weight, block.attn_out_proj.bias
        fc2, fc2_bias = block.mlp_out_proj.weight, block.mlp_out_proj.bias

    def attend(x, present):
        _, q, k, v = block.in_proj(block.in_norm(x)).split(block.in_split, -1)
        out = attention_of(block, q, k, v)
        return block.ls(functional.linear(out, proj, proj_bias))

    def mlp(z):
        u = block.in_proj(tiled_norm(block.in_norm, z))[:, :hidden]
        u = u if block.mlp_bias is None else u + block.mlp_bias
        return block.ls(functional.linear(block.mlp_act(u), fc2, fc2_bias).mean(0))

    return attend, mlp


def softmax_attention(q, k, v):
    return ((q @ k.T) / q.shape[-1] ** 0.5).softmax(-1) @ v


def attention_of(block, q, k, v):
    """Attention of ``(n, C)`` queries, keys and values, head by head."""
    heads = [x.chunk(block.num_heads, -1) for x in (q, k, v)]
    out = []
    for q, k, v in zip(*heads, strict=True):
        if isinstance(block, DiffParallelScalingBlock):
            first, second = (
                softmax_attention(block.q_norm(q), block.k_norm(k), v)
                for q, k in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
            )
            if block.dual_lambda:
                factor = block.lambda_a.exp() - block.lambda_b.exp()
            else:
                # timm takes the exponential in float32, whatever the type of the model.
                factor = (block.lambda_q1 @ block.lambda_k1).float().exp()
                factor = factor - (block.lambda_q2 @ block.lambda_k2).float().exp()
            mixed = first - (factor + block.lambda_init) * second
            scale = (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            out.append(mixed / scale * block.sub_norm.weight * (1 - block.lambda_init))
        else:
            out.append(softmax_attention(block.q_norm(q), block.k_norm(k), v))
    return torch.cat(out, -1)


BRANCHES = {
    ResPostBlock: residual_post_norm,
    ParallelThingsBlock: parallel_things,
    ParallelScalingBlock: parallel_scaling,
    DiffParallelScalingBlock: parallel_scaling,
}


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    outs = []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index == layer:
            attend, mlp = BRANCHES[type(block)](block)
            tokens = merge_batch(
                tokens,
                grid,
                model.num_prefix_tokens,
                window,
                attend if attention else None,
                mlp,
                parallel=BRANCHES[type(block)] is parallel_scaling,
            )
        outs.append(tokens)
    return outs, model.norm(tokens)


def stem():
    """A stem that halves the resolution twice, rounding up."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 32, 3, 2, 1))


def hybrid(**options):
    return HybridEmbed(stem(), **options)


def block_case(block_fn, variants):
    return Case(functools.partial(make, block_fn=block_fn), by_hand, variants)


LAYER_SCALE = {"init_values": 0.3, "img_size": 32}
NO_BIASES = {"qkv_bias": False, "proj_bias": False, "qk_norm": True}
fused = functools.partial(ParallelScalingBlock, fuse_out_proj=True)
dual = functools.partial(DiffParallelScalingBlock, dual_lambda=True)

NO_TOKENS = {"class_token": False, "global_pool": "avgmax"}

CASES = {
    "VisionTransformer, parts": Case(
        make,
        vision_transformer.by_hand,
        {
            "differential attention": {"attn_layer": "diff"},
            "differential attention, norms": {
                "attn_layer": "diff",
                "qk_norm": True,
                "scale_attn_norm": True,
                "img_size": (20, 36),
            },
            "SwiGLU": {"mlp_layer": SwiGLU, "init_values": 0.3},
            "SwiGLU, packed": {"mlp_layer": SwiGLUPacked, "img_size": 32},
            "GLU, gate last, SiLU": {
                "mlp_layer": functools.partial(GluMlp, gate_last=True),
                "act_layer": "silu",
            },
            "AIMv2": {
                "mlp_layer": SwiGLU,
                "norm_layer": functools.partial(RmsNorm, eps=1e-5),
                "qkv_bias": False,
                "proj_bias": False,
                "class_token": False,
                "global_pool": "avg",
            },
            "BEiT3": {"scale_attn_norm": True, "scale_mlp_norm": True},
            "GLU with a norm": {"mlp_layer": SwiGLUPacked, "scale_mlp_norm": True},
            "RMSNorm": {"norm_layer": RmsNorm, "qk_norm": True},
        },
    ),
    "ViTamin": Case(
        functools.partial(make, embed_layer=hybrid, patch_size=1, mlp_layer=GeGluMlp),
        vision_transformer.by_hand,
        {
            "any size": {"dynamic_img_size": True, "global_pool": "map"},
            "odd": {"global_pool": "prr"},
            "not square": NO_TOKENS | {"img_size": (20, 36), "pos_embed": "none"},
        },
        sizes=((28, 28), (12, 40)),
    ),
    "ResPostBlock": block_case(ResPostBlock, {"odd": {}, "initial values": LAYER_SCALE}),
    "ParallelScalingBlock": block_case(
        ParallelScalingBlock,
        {
            "odd": {},
            "layer scale": LAYER_SCALE,
            "no biases": NO_BIASES,
            "one output projection": {"block_fn": fused},
            "one output projection, no biases": {"block_fn": fused} | NO_BIASES,
        },
    ),
    "DiffParallelScalingBlock": block_case(
        DiffParallelScalingBlock,
        {
            "odd": {},
            "layer scale": LAYER_SCALE,
            "no biases": NO_BIASES,
            "two lambdas": {"block_fn": dual},
        },
    ),
    "ParallelThingsBlock": block_case(
        ParallelThingsBlock,
        {
            "odd": {},
            "layer scale": LAYER_SCALE,
            "differential": {"attn_layer": "diff", "mlp_layer": SwiGLU},
            "three": {"block_fn": functools.partial(ParallelThingsBlock, num_parallel=3)},
        },
    ),
}
