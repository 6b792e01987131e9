# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled`` with a compressor."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer as timm
from torch import nn

from uhd_ops._reclass import body_class
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec
from uhd_ops.nn.layers import linear_of
from uhd_ops.retrofit import checks
from uhd_ops.retrofit.blocks import CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.families import _timm_parts as parts
from uhd_ops.retrofit.layout import TokenLayout
from uhd_ops.retrofit.model import (
    CompressedModel,
    Family,
    image_layout,
    refuse_masks,
    require_methods,
)


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a block that runs its branches one after the other, or side by side."""
    checks.require_own_forward(block, "block")
    cls = body_class(block)
    if cls is timm.ParallelThingsBlock:
        return checks.check_shapes(_read_things(block))
    if cls in (timm.ParallelScalingBlock, timm.DiffParallelScalingBlock):
        return checks.check_shapes(_read_scaling(block))
    around = _post_norm if cls is timm.ResPostBlock else _pre_norm
    attention = parts.vit_attention(block.attn, "block.attn", **around(block, 1))
    mlp = parts.vit_mlp(block.mlp, "block.mlp", **around(block, 2))
    dim = block.attn.qkv.in_features
    return checks.check_shapes(BlockSpec(dim, (attention,), (mlp,)))


def _pre_norm(block: nn.Module, branch: int) -> dict[str, object]:
    return {
        "norm": _norm(block, branch),
        "post": parts.layer_scale(getattr(block, f"ls{branch}"), f"block.ls{branch}"),
        "drop_path": _drop_path(block, branch),
    }


def _post_norm(block: nn.Module, branch: int) -> dict[str, object]:
    return {"post": _norm(block, branch), "drop_path": _drop_path(block, branch)}


def _norm(block: nn.Module, branch: int) -> nn.Module | None:
    return parts.norm(getattr(block, f"norm{branch}"), f"block.norm{branch}")


def _drop_path(block: nn.Module, branch: int) -> float:
    return parts.drop_path(getattr(block, f"drop_path{branch}"), f"block.drop_path{branch}")


_LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def _read_things(block: nn.Module) -> BlockSpec:
    """Several attentions side by side, then several MLPs, each with its norm and LayerScale."""
    attentions = [
        parts.vit_attention(branch.attn, f"{name}.attn", **_around(branch, name))
        for branch, name in _sequences(block, "attns", "attn")
    ]
    mlps = [
        parts.vit_mlp(branch.mlp, f"{name}.mlp", **_around(branch, name))
        for branch, name in _sequences(block, "ffns", "mlp")
    ]
    dim = block.attns[0].attn.qkv.in_features
    return BlockSpec(dim, tuple(attentions), tuple(mlps))


def _sequences(block: nn.Module, name: str, body: str) -> list[tuple[nn.Module, str]]:
    """The branches by name, each a Sequential of four."""
    branches = getattr(block, name)
    checks.require_exactly(branches, f"block.{name}", (nn.ModuleList,))
    found = [(branch, f"block.{name}.{index}") for index, branch in enumerate(branches)]
    for branch, label in found:
        checks.require_exactly(branch, label, (nn.Sequential,))
        checks.require_own_forward(branch, label)
        expected, names = ["norm", body, "ls", "drop_path"], list(branch._modules)
        if names != expected:
            raise NotImplementedError(f"{label} must hold {expected}, got {names}")
    return found


def _around(branch: nn.Module, name: str) -> dict[str, object]:
    return {
        "norm": parts.norm(branch.norm, f"{name}.norm"),
        "post": parts.layer_scale(branch.ls, f"{name}.ls"),
        "drop_path": parts.drop_path(branch.drop_path, f"{name}.drop_path"),
    }


def _read_scaling(block: nn.Module) -> BlockSpec:
    """Attention and MLP with one norm in front, one projection in and one factor behind.

    Either branch gets copies of norm and LayerScale. Drop path, which takes both branches of a view
    together in the block, takes each on its own in the compressor.
    """
    checks.require_plain(block, "block", ("mlp_bias", *_LAMBDAS))
    fc1, qkv = _split_in(block)
    proj, fc2 = _split_out(block)
    around = {
        "norm": parts.norm(block.in_norm, "block.in_norm"),
        "post": parts.layer_scale(block.ls, "block.ls"),
        "drop_path": parts.drop_path(block.drop_path, "block.drop_path"),
    }
    mlp = MlpSpec(
        fc1,
        fc2,
        parts.activation(block.mlp_act, "block.mlp_act"),
        hidden_dropout=checks.dropout(block.mlp_drop, "block.mlp_drop"),
        **around,
    )
    parts.check_scale(block, "block")
    if hasattr(block, "lambda_init"):
        own = _diff_attention(block, qkv, proj)
        attention = parts.vit_attention(own, "block", **around)
    else:
        attention = AttentionSpec(
            block.num_heads,
            (qkv,),
            proj,
            block.head_dim,
            q_norm=parts.norm(block.q_norm, "block.q_norm"),
            k_norm=parts.norm(block.k_norm, "block.k_norm"),
            attention_dropout=checks.dropout(block.attn_drop, "block.attn_drop"),
            **around,
        )
    return BlockSpec(block.in_proj.in_features, (attention,), (mlp,), parallel=True)


def _split_in(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Split ``in_proj``, whose rows are fc1, queries, keys and values."""
    hidden, dim, *_ = block.in_split
    packed = _packed(block, "in_proj", (hidden + 3 * dim, dim))
    sizes = (hidden, 3 * dim)
    weights = packed.weight.split(sizes)
    biases = (block.mlp_bias, None) if packed.bias is None else packed.bias.split(sizes)
    fc1, qkv = map(linear_of, weights, biases)
    return fc1, qkv


def _split_out(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Return the output projection of the attention and fc2, which may be one Linear."""
    if getattr(block, "attn_out_proj", None) is not None:
        return (
            checks.linear(block.attn_out_proj, "block.attn_out_proj"),
            checks.linear(block.mlp_out_proj, "block.mlp_out_proj"),
        )
    hidden, dim, *_ = block.in_split
    packed = _packed(block, "out_proj", (dim, dim + hidden))
    proj, fc2 = packed.weight.split((dim, hidden), 1)
    # The bias goes with the MLP, which is there with and without attention.
    return linear_of(proj, None), linear_of(fc2, packed.bias)


def _packed(block: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear:
    packed = checks.linear(getattr(block, name), f"block.{name}")
    if packed.weight.shape != shape:
        raise NotImplementedError(
            f"block.{name}.weight must have shape {shape}, got {tuple(packed.weight.shape)}"
        )
    return packed


def _diff_attention(block: nn.Module, qkv: nn.Linear, proj: nn.Linear) -> nn.Module:
    """The attention of a ``DiffParallelScalingBlock`` as the module that timm has for it."""
    attention = parts.DiffAttention(
        qkv.in_features, block.num_heads, dual_lambda=block.dual_lambda, device="meta"
    )
    attention.qkv, attention.proj = qkv, proj
    for name in ("q_norm", "k_norm", "sub_norm", "attn_drop", *_LAMBDAS):
        setattr(attention, name, getattr(block, name))
    for name in ("scale", "lambda_init", "attn_drop_p", "fused_attn"):
        setattr(attention, name, getattr(block, name))
    return attention


# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class CompressedVitBlock(CompressedBlock):
    """A block of a VisionTransformer."""

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        refuse_masks({"attn_mask": attn_mask, "is_causal": is_causal})
        return super().forward(x)


class CompressedVisionTransformer(CompressedModel):
    """A VisionTransformer with a compressor."""

    def _layout(self, x: torch.Tensor, **options: Any) -> TokenLayout:
        return image_layout(self, x, self.num_prefix_tokens)


def check(vit: timm.VisionTransformer, config: Config) -> None:
    """Refuse a model that is not understood."""
    require_methods(vit, timm.VisionTransformer, _METHODS)
    require_patch_embedding(vit)


def require_patch_embedding(vit: nn.Module) -> None:
    """Refuse a patch embedding that does not tell its grid."""
    embed = vit.patch_embed
    size = getattr(embed, "dynamic_feat_size", None)
    if size is None or embed.img_size is None or size(embed.img_size) != tuple(embed.grid_size):
        raise NotImplementedError(
            f"vit.patch_embed must tell its patch grid by dynamic_feat_size, as PatchEmbed does; "
            f"{type(embed).__name__} does not"
        )


FAMILY = Family(CompressedVisionTransformer, CompressedVitBlock, None, check)
