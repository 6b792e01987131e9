# SPDX-License-Identifier: Apache-2.0
"""Which options and which blocks nn.EarlyCompressor refuses, and with what words."""

import functools

import pytest
import torch
from timm.layers import AttentionRope, GatedMlp, SimpleNorm
from timm.models import cait, convit
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
)
from torch import nn
from torch.nn.utils import prune

from uhd_ops.nn import EarlyCompressor

DIM, HEADS = 32, 2


def spoil(cls=Block, **parts):
    block = cls(DIM, HEADS)
    for name, part in parts.items():
        owner, _, leaf = name.rpartition("__")
        setattr(block.get_submodule(owner.replace("__", ".")), leaf, part)
    return block


def pruned(inputs, outputs):
    return prune.l1_unstructured(nn.Linear(inputs, outputs), "weight", 0.5)


class OtherBlock(Block):
    pass


def quantised(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


PLAIN = "must hold its weight as a plain parameter, got weight_mask, weight_orig"
REFUSED = {
    "class attention": (
        lambda: cait.LayerScaleBlockClassAttn(DIM, HEADS),
        r"got LayerScaleBlockClassAttn \(timm.models.cait\)",
    ),
    "a Block of another file": (
        lambda: convit.Block(DIM, HEADS),
        r"block must be one of Block, .*, got Block \(timm.models.convit\)",
    ),
    "subclass": (lambda: OtherBlock(DIM, HEADS), "block must be one of Block, .*, got OtherBlock"),
    "no block": (lambda: nn.Linear(2, 2), "block must be one of Block, .*, got Linear"),
    "gated MLP": (
        lambda: spoil(mlp=GatedMlp(DIM, 64)),
        "block.mlp must be Mlp or GluMlp or SwiGLU or GeGluMlp, got GatedMlp",
    ),
    "rotary attention": (
        lambda: spoil(attn=AttentionRope(DIM, HEADS)),
        "block.attn must be Attention or DiffAttention, got AttentionRope",
    ),
    "norm in the MLP": (
        lambda: spoil(mlp__norm=SimpleNorm(128)),
        "block.mlp.norm must be LayerNorm or .* or RmsNormFp32, got SimpleNorm",
    ),
    "norm in the attention": (
        lambda: spoil(attn__norm=SimpleNorm(DIM)),
        "block.attn.norm must be LayerNorm or .*, got SimpleNorm",
    ),
    "norm in front": (
        lambda: spoil(norm2=SimpleNorm(DIM)),
        "block.norm2 must be LayerNorm or .*, got SimpleNorm",
    ),
    "differential attention, pruned": (
        lambda: spoil(functools.partial(Block, attn_layer="diff"), attn__qkv=pruned(DIM, 96)),
        f"block.attn.qkv {PLAIN}",
    ),
    "quantised in place": (
        lambda: spoil(attn__qkv=quantised(DIM, 96)),
        "block.attn.qkv.weight must have a floating dtype, got torch.int8",
    ),
    "parallel, pruned": (
        lambda: spoil(ParallelScalingBlock, in_proj=pruned(DIM, 224)),
        f"block.in_proj {PLAIN}",
    ),
    "parallel, narrow": (
        lambda: spoil(ParallelScalingBlock, in_proj=nn.Linear(DIM, 96)),
        r"block.in_proj.weight must have shape \(224, 32\), got \(96, 32\)",
    ),
    "parallel and differential, narrow": (
        lambda: spoil(DiffParallelScalingBlock, out_proj=nn.Linear(64, DIM)),
        r"block.out_proj.weight must have shape \(32, 160\), got \(32, 64\)",
    ),
    "talking heads, narrow": (
        lambda: spoil(cait.LayerScaleBlock, attn__proj=nn.Linear(16, DIM)),
        r"block.attn.proj.weight must have shape \(32, 32\), got \(32, 16\)",
    ),
    "parallel, other scale": (
        lambda: spoil(ParallelScalingBlock, scale=1.0),
        "block.scale must be head_dim",
    ),
    "parallel and differential, pruned": (
        lambda: spoil(DiffParallelScalingBlock, out_proj=pruned(160, DIM)),
        f"block.out_proj {PLAIN}",
    ),
    "parallel and differential, norm": (
        lambda: spoil(DiffParallelScalingBlock, sub_norm=SimpleNorm(16)),
        "block.sub_norm must be LayerNorm or .*, got SimpleNorm",
    ),
    "three things": (
        lambda: spoil(ParallelThingsBlock, ffns__1__mlp=GatedMlp(DIM, 64)),
        "block.ffns.1.mlp must be Mlp or .*, got GatedMlp",
    ),
    "three things, adapted": (
        lambda: spoil(ParallelThingsBlock, attns__0__adapter=nn.Linear(DIM, DIM)),
        r"block.attns.0 must hold \['norm', 'attn', 'ls', 'drop_path'\], got .*'adapter'\]",
    ),
    "talking heads, pruned": (
        lambda: spoil(cait.LayerScaleBlock, attn__proj_l=pruned(HEADS, HEADS)),
        f"block.attn.proj_l {PLAIN}",
    ),
    "activation": (
        lambda: Block(DIM, HEADS, act_layer=nn.Mish),
        "block.mlp.act must be GELU or GELUTanh or QuickGELU or SiLU or ReLU, got Mish",
    ),
    "adapted Linear": (
        lambda: spoil(attn__qkv=nn.utils.parametrizations.weight_norm(nn.Linear(DIM, 96))),
        "block.attn.qkv must be Linear, got ParametrizedLinear",
    ),
    "pruned Linear": (
        lambda: spoil(mlp__fc1=pruned(DIM, 128)),
        f"block.mlp.fc1 {PLAIN}",
    ),
    "spectral norm in a hook": (
        lambda: spoil(attn__proj=nn.utils.spectral_norm(nn.Linear(DIM, DIM))),
        "block.attn.proj must hold its weight as a plain parameter, got weight_orig, weight_u",
    ),
    "patched block": (
        lambda: spoil(forward=lambda x: x),
        "block must have the forward of its class, got one of its own",
    ),
    "patched attention": (
        lambda: spoil(attn__forward=lambda x: x),
        "block.attn must have the forward of its class",
    ),
    "patched Linear": (
        lambda: spoil(attn__qkv__forward=lambda x: x),
        "block.attn.qkv must have the forward of its class",
    ),
    "other scale": (lambda: spoil(attn__scale=1.0), "block.attn.scale must be head_dim"),
    "narrow projection": (
        lambda: spoil(attn__proj=nn.Linear(16, DIM)),
        r"block.attn.proj.weight must have shape \(32, 32\), got \(32, 16\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_does_not_understand(make, message):
    with pytest.raises(NotImplementedError, match=message):
        EarlyCompressor.from_block(make())
