# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled`` with a compressor."""

from __future__ import annotations

import functools

import torch
from timm import layers
from timm.models import vision_transformer as timm
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.config import CompressorConfig
from uhd_ops.nn.modules import LinearView, PartView, body_class, clone_module
from uhd_ops.retrofit.adapter import (
    CompressedBlock,
    CompressedModel,
    Family,
    require_methods,
)
from uhd_ops.retrofit.families import _timm_parts as parts
from uhd_ops.retrofit.packed import Grid, PackedModel


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a block that runs its branches one after the other, or side by side."""
    modules.require_own_forward(block, "block")
    cls = body_class(block)
    if cls is timm.ParallelThingsBlock:
        return _read_things(block)
    if cls in (timm.ParallelScalingBlock, timm.DiffParallelScalingBlock):
        return _read_scaling(block)
    post_norm = cls is timm.ResPostBlock
    around = functools.partial(parts.around, block, scale="ls", post_norm=post_norm)
    attention = parts.vit_attention(block.attn, "block.attn", **around(1))
    mlp = parts.vit_mlp(block.mlp, "block.mlp", **around(2))
    dim = block.attn.qkv.in_features
    return BlockSpec(dim, (attention,), (mlp,), block=block)


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
    return BlockSpec(dim, tuple(attentions), tuple(mlps), block=block)


def _sequences(block: nn.Module, name: str, body: str) -> list[tuple[nn.Module, str]]:
    """The branches by name, each a Sequential of four."""
    branches = getattr(block, name)
    modules.require_exactly(branches, f"block.{name}", (nn.ModuleList,))
    found = [(branch, f"block.{name}.{index}") for index, branch in enumerate(branches)]
    for branch, label in found:
        modules.require_exactly(branch, label, (nn.Sequential,))
        modules.require_own_forward(branch, label)
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

    Either branch has the norm and the LayerScale. Drop path, which takes both branches of a view
    together in the block, takes each on its own in the compressor.
    """
    modules.require_plain(block, "block", ("mlp_bias", *_LAMBDAS))
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
        hidden_dropout=modules.dropout(block.mlp_drop, "block.mlp_drop"),
        **around,
    )
    parts.check_scale(block, "block")
    if hasattr(block, "lambda_init"):
        own = DiffAttentionView(block, qkv, proj)
        parts.vit_attention(own.build(), "block")
        attention = OwnAttentionSpec(own, **around)
    else:
        attention = AttentionSpec(
            block.num_heads,
            (qkv,),
            proj,
            block.head_dim,
            q_norm=parts.norm(block.q_norm, "block.q_norm"),
            k_norm=parts.norm(block.k_norm, "block.k_norm"),
            attention_dropout=modules.dropout(block.attn_drop, "block.attn_drop"),
            **around,
        )
    dim = block.in_proj.in_features
    return BlockSpec(dim, (attention,), (mlp,), parallel=True, drop_together=True, block=block)


def _split_in(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Split ``in_proj``, whose rows are fc1, queries, keys and values."""
    hidden, dim, *_ = block.in_split
    end, packed = hidden + 3 * dim, block.in_proj
    bias = True if packed.bias is not None else lambda: block.mlp_bias
    return (
        LinearView(packed, (0, hidden), bias=bias, shape=(end, dim)),
        LinearView(packed, (hidden, end), shape=(end, dim)),
    )


def _split_out(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the output projection of the attention and fc2, which may be one layer."""
    if getattr(block, "attn_out_proj", None) is not None:
        return block.attn_out_proj, block.mlp_out_proj
    hidden, dim, *_ = block.in_split
    packed, shape = block.out_proj, (dim, dim + hidden)
    # The bias goes with the MLP, which is there with and without attention.
    return (
        LinearView(packed, columns=(0, dim), bias=False, shape=shape),
        LinearView(packed, columns=(dim, dim + hidden), shape=shape),
    )


class DiffAttentionView(PartView):
    """The attention of a ``DiffParallelScalingBlock`` as the module that timm has for it.

    Args:
        block: The block.
        qkv: Its projection in.
        proj: Its projection out.
    """

    def __init__(self, block: nn.Module, qkv: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.owner = (block,)  # in a tuple, so that it does not become a submodule
        self.qkv, self.proj = qkv, proj
        for name in ("q_norm", "k_norm", "sub_norm", "attn_drop"):
            setattr(self, name, getattr(block, name))

    def build(self) -> nn.Module:
        """Return a ``DiffAttention`` of the block's own parts, as they are now."""
        (block,) = self.owner
        dim = block.in_proj.in_features
        attention = parts.DiffAttention(
            dim, block.num_heads, dual_lambda=block.dual_lambda, device="meta"
        )
        attention.training = block.training
        for name, part in self.named_children():
            setattr(attention, name, part)
        for name in (*_LAMBDAS, "scale", "lambda_init", "attn_drop_p", "fused_attn"):
            setattr(attention, name, getattr(block, name))
        return attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(n, L, C)`` to the same."""
        return self.build()(x)

    def clone(self) -> nn.Module:
        """Return a ``DiffAttention`` with copies of the parts."""
        return clone_module(self.build())


_STEMS = (layers.PatchEmbed, layers.HybridEmbed)
# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class CompressedVitBlock(CompressedBlock):
    """A block of a VisionTransformer."""

    masks = ("attn_mask", "is_causal")


def check(vit: timm.VisionTransformer, config: CompressorConfig) -> None:
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


class PackedTimm(PackedModel):
    """A model of timm on packed views."""

    @classmethod
    def check(cls, vit: nn.Module) -> None:
        """Refuse a patch embedding that is not understood."""
        modules.require_exactly(vit.patch_embed, "vit.patch_embed", _STEMS)
        modules.require_own_forward(vit.patch_embed, "vit.patch_embed")

    @classmethod
    def patch_size(cls, vit: nn.Module) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        return tuple(vit.patch_embed.feat_ratio(as_scalar=False))

    @classmethod
    def channels(cls, vit: nn.Module) -> int:
        """Channels of a pixel."""
        stem = vit.patch_embed
        return stem.in_chans if hasattr(stem, "in_chans") else stem.proj.in_channels

    @classmethod
    def like(cls, vit: nn.Module) -> torch.Tensor:
        """The first parameter of the patch embedding."""
        return next(vit.patch_embed.parameters())

    @classmethod
    def pads(cls, vit: nn.Module) -> bool:
        """Whether ``dynamic_img_pad`` pads images; behind a backbone it pads something else."""
        return type(vit.patch_embed) is layers.PatchEmbed and vit.patch_embed.dynamic_img_pad

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """A convolution, or a backbone on whole views."""
        stem = self.vit.patch_embed
        if type(stem) is layers.PatchEmbed:
            return stem.norm(self.convolve(stem.proj, pixels))

        def run(images: torch.Tensor) -> torch.Tensor:
            tokens = stem(images)
            if stem.output_fmt == layers.Format.NHWC:
                return tokens.permute(0, 3, 1, 2)
            return tokens.transpose(1, 2) if tokens.dim() == 3 else tokens

        return self.view_by_view(run, pixels)


class PackedVisionTransformer(PackedTimm):
    """A VisionTransformer on packed views."""

    methods = ("forward_features", "_pos_embed")

    @classmethod
    def check(cls, vit: nn.Module) -> None:
        """Refuse a patch embedding or prefix tokens that are not understood."""
        super().check(vit)
        prefix = sum(token.shape[1] for token in prefix_tokens(vit))
        if prefix != vit.num_prefix_tokens:
            raise NotImplementedError(
                "vit must have as many class, distillation and register tokens as "
                f"num_prefix_tokens = {vit.num_prefix_tokens}, got {prefix}"
            )

    @property
    def _positioned(self) -> int:
        """How many prefix tokens have a position."""
        return 0 if getattr(self.vit, "no_embed_class", False) else self.vit.num_prefix_tokens

    def prefix(self) -> torch.Tensor | None:
        """Class, distillation and register tokens."""
        tokens = prefix_tokens(self.vit)
        if not tokens:
            return None
        if self.vit.pos_embed is None or not self._positioned:
            return torch.cat(tokens, 1)
        return torch.cat(tokens, 1) + self.vit.pos_embed[:, : self._positioned]

    def absolute(self, grid: Grid) -> torch.Tensor | None:
        """As ``dynamic_img_size`` and ``set_input_size`` resample them."""
        if self.vit.pos_embed is None:
            return None
        return layers.resample_abs_pos_embed(
            self.vit.pos_embed,
            new_size=list(grid),
            old_size=list(self.vit.patch_embed.grid_size),
            num_prefix_tokens=self._positioned,
        )[0, self._positioned :]

    def learned(self) -> torch.Tensor | None:
        """Without those of prefix tokens."""
        if self.vit.pos_embed is None:
            return None
        return self.vit.pos_embed[0, self._positioned :].unflatten(
            0, self.vit.patch_embed.grid_size
        )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout and the norm in front of the first block."""
        return self.vit.norm_pre(x if self.vit.pos_embed is None else self.vit.pos_drop(x))


def prefix_tokens(vit: nn.Module) -> list[torch.Tensor]:
    """Return the class, distillation and register tokens that stand in front of the patches."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = (getattr(vit, name, None) for name in names)
    return [token for token in tokens if token is not None]


FAMILY = Family(CompressedModel, CompressedVitBlock, None, check, packed=PackedVisionTransformer)
