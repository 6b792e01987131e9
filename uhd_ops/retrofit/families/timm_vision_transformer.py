# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled`` with a compressor.

Other models of timm are made of the same parts (attention, MLPs, norms, LayerScale, drop path), and
their files read them by the functions of this one.
"""

from __future__ import annotations

import functools

import torch
from timm import layers
from timm.layers import activations
from timm.models import vision_transformer as timm
from timm.models import vitamin
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import LinearView, PartView, ScaleView, body_class, clone_module
from uhd_ops.retrofit.adapter import (
    CompressedBlock,
    CompressedModel,
    Family,
    require_methods,
)
from uhd_ops.retrofit.packed import Grid, PackedModel, tensors_at

# ---- the parts of blocks -------------------------------------------------------------------------

# Differential attention came later than the rest.
_ATTENTIONS = modules.present(layers, "Attention", "DiffAttention")
_SCALING_BLOCKS = modules.present(timm, "ParallelScalingBlock", "DiffParallelScalingBlock")
_MLPS = (layers.Mlp, layers.GluMlp, layers.SwiGLU, vitamin.GeGluMlp)


LAYER_NORMS = (nn.LayerNorm, layers.LayerNorm, layers.LayerNormFp32)
NORMS = (*LAYER_NORMS, layers.RmsNorm, layers.RmsNormFp32)
ACTIVATIONS = {
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


# A norm over the last dimension; None for an Identity.
norm = functools.partial(modules.optional, classes=NORMS)


def layer_scale(module: nn.Module, name: str) -> ScaleView | None:
    """Return the factors of a LayerScale; None for an Identity."""
    scale = modules.optional(module, name, (timm.LayerScale,))
    return None if scale is None else ScaleView(scale, "gamma", calls=True)


def factors(block: nn.Module, name: str) -> ScaleView | None:
    """Return the LayerScale factors that a block holds itself; None where it has none."""
    return None if getattr(block, name) is None else ScaleView(block, name, calls=False)


def drop_path(module: nn.Module, name: str) -> float:
    """Return the probability of a DropPath, 0 for an Identity."""
    modules.require_exactly(module, name, (layers.DropPath, nn.Identity))
    if not getattr(module, "scale_by_keep", True):
        raise NotImplementedError(f"{name} must have scale_by_keep=True, got False")
    return float(getattr(module, "drop_prob", 0.0) or 0.0)


def around(
    block: nn.Module, branch: int, scale: str = "", *, post_norm: bool = False
) -> dict[str, object]:
    """Read what is around one of the two branches of a block, for AttentionSpec and MlpSpec.

    Args:
        block: It has ``norm<branch>`` and ``drop_path<branch>``.
        branch: 1 for the attention, 2 for the MLP.
        scale: What the name of the LayerScale begins with, ``"ls"`` for modules and ``"gamma_"``
            for parameters; empty where there is none.
        post_norm: Whether the norm follows the branch.
    """
    normalise = norm(getattr(block, f"norm{branch}"), f"block.norm{branch}")
    path = drop_path(getattr(block, f"drop_path{branch}"), f"block.drop_path{branch}")
    if post_norm:
        return {"post": normalise, "drop_path": path}
    if scale == "ls":
        post = layer_scale(getattr(block, f"ls{branch}"), f"block.ls{branch}")
    else:
        post = factors(block, f"{scale}{branch}") if scale else None
    return {"norm": normalise, "post": post, "drop_path": path}


def activation(module: nn.Module, name: str) -> str:
    """Return the operators' name of an activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    modules.require_exactly(module, name, (nn.GELU, *ACTIVATIONS))
    return ACTIVATIONS[type(module)]


def attention(
    module: nn.Module,
    name: str,
    classes: tuple[type, ...] = _ATTENTIONS,
    projections: tuple[nn.Module, ...] | None = None,
    **branch: object,
) -> AttentionSpec | OwnAttentionSpec:
    """Read timm's attention, differential or not, or one that adds something to its scores.

    Args:
        module: The attention.
        name: What to call it in messages.
        classes: Its class is one of these.
        projections: As for AttentionSpec; None means ``module.qkv``.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of AttentionSpec.
    """
    modules.require_exactly(module, name, classes)
    modules.require_own_forward(module, name)
    check_scale(module, name)
    if type(module) in _ATTENTIONS[1:]:
        _check_diff_attention(module, name)
        norm(module.norm, f"{name}.norm")
        modules.dropout(module.proj_drop, f"{name}.proj_drop")
        return OwnAttentionSpec(module, **branch)
    return AttentionSpec(
        module.num_heads,
        projections or (module.qkv,),
        module.proj,
        module.head_dim,
        q_norm=norm(module.q_norm, f"{name}.q_norm"),
        k_norm=norm(module.k_norm, f"{name}.k_norm"),
        inner_norm=norm(getattr(module, "norm", None), f"{name}.norm"),
        gate=modules.optional(getattr(module, "gate", None), f"{name}.gate", (nn.Linear,)),
        attention_dropout=modules.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=modules.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def _check_diff_attention(module: nn.Module, name: str) -> None:
    for part in ("q_norm", "k_norm", "sub_norm"):
        norm(getattr(module, part), f"{name}.{part}")
    modules.dropout(module.attn_drop, f"{name}.attn_drop")


def check_scale(module: nn.Module, name: str, head_dim: int | None = None) -> None:
    """Refuse a factor on the scores other than ``head_dim ** -0.5``, of the module or as given."""
    expected = (head_dim or module.head_dim) ** -0.5
    if abs(module.scale - expected) > 1e-6 * expected:
        raise NotImplementedError(
            f"{name}.scale must be head_dim ** -0.5 = {expected}, got {module.scale}"
        )


def mlp(module: nn.Module, name: str, **branch: object) -> MlpSpec:
    """Read one of timm's MLPs: ``Mlp``, ``GluMlp``, ``SwiGLU``, or ViTamin's ``GeGluMlp``.

    Args:
        module: The MLP.
        name: What to call it in messages.
        branch: What is around it: ``norm``, ``post``, ``drop_path`` of MlpSpec.
    """
    modules.require_exactly(module, name, _MLPS)
    modules.require_own_forward(module, name)
    inside = "inner_norm"
    if type(module) is vitamin.GeGluMlp:
        modules.require_version("timm", "1.0.31", f"{name}, a GeGluMlp,")
        gate, fc1, fc2, inside = module.w0, module.w1, module.w2, "patch_norm"
    elif type(module) is layers.SwiGLU:
        gate, fc1, fc2 = module.fc1_g, module.fc1_x, module.fc2
    elif type(module) is layers.GluMlp:
        halves = _halves(module.fc1)
        (gate, fc1), fc2 = reversed(halves) if module.gate_last else halves, module.fc2
    else:
        gate, fc1, fc2 = None, module.fc1, module.fc2
    return MlpSpec(
        fc1,
        fc2,
        activation(module.act, f"{name}.act"),
        gate=gate,
        hidden_dropout=modules.dropout(module.drop1, f"{name}.drop1"),
        output_dropout=modules.dropout(module.drop2, f"{name}.drop2"),
        **{inside: norm(module.norm, f"{name}.norm")},
        **branch,
    )


def biased(module: nn.Module) -> LinearView:
    """Return the fused projection of an attention that holds the biases of its thirds."""
    return LinearView(
        module.qkv,
        bias=lambda: torch.cat([module.q_bias, module.k_bias, module.v_bias]),
        calls=module.qkv_bias_separate,
    )


def _halves(packed: nn.Module) -> list[nn.Module]:
    """Split a linear layer whose rows are two layers, one after the other.

    The block-diagonal form must be made of each of them: the blocks of the packed weight would make
    some patches the gates of others.
    """
    rows = packed.out_features // 2
    return [LinearView(packed, (0, rows)), LinearView(packed, (rows, 2 * rows))]


# ---- blocks --------------------------------------------------------------------------------------


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a block that runs its branches one after the other, or side by side."""
    modules.require_own_forward(block, "block")
    cls = body_class(block)
    if cls is timm.ParallelThingsBlock:
        return _read_things(block)
    if cls in _SCALING_BLOCKS:
        return _read_scaling(block)
    post_norm = cls is timm.ResPostBlock
    side = functools.partial(around, block, scale="ls", post_norm=post_norm)
    attn = attention(block.attn, "block.attn", **side(1))
    ffn = mlp(block.mlp, "block.mlp", **side(2))
    return BlockSpec(block.attn.qkv.in_features, (attn,), (ffn,), block=block)


_DIFF_PARTS = ("in_proj", "out_proj", "attn_out_proj", "q_norm", "k_norm", "sub_norm")
_LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def _read_things(block: nn.Module) -> BlockSpec:
    """Several attentions side by side, then several MLPs, each with its norm and LayerScale."""
    attentions = [
        attention(branch.attn, f"{name}.attn", **_around(branch, name))
        for branch, name in _sequences(block, "attns", "attn")
    ]
    mlps = [
        mlp(branch.mlp, f"{name}.mlp", **_around(branch, name))
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
        "norm": norm(branch.norm, f"{name}.norm"),
        "post": layer_scale(branch.ls, f"{name}.ls"),
        "drop_path": drop_path(branch.drop_path, f"{name}.drop_path"),
    }


def _read_scaling(block: nn.Module) -> BlockSpec:
    """Attention and MLP with one norm in front, one projection in and one factor behind.

    Either branch has the norm and the LayerScale. Drop path, which takes both branches of a view
    together in the block, takes each on its own in the compressor.
    """
    modules.require_version("timm", "1.0.25", f"block, a {body_class(block).__name__},")
    modules.require_plain(block, "block", ("mlp_bias", *_LAMBDAS))
    fc1, qkv = _split_in(block)
    proj, fc2 = _split_out(block)
    around = {
        "norm": norm(block.in_norm, "block.in_norm"),
        "post": layer_scale(block.ls, "block.ls"),
        "drop_path": drop_path(block.drop_path, "block.drop_path"),
    }
    ffn = MlpSpec(
        fc1,
        fc2,
        activation(block.mlp_act, "block.mlp_act"),
        hidden_dropout=modules.dropout(block.mlp_drop, "block.mlp_drop"),
        **around,
    )
    check_scale(block, "block")
    if hasattr(block, "lambda_init"):
        _check_diff_attention(block, "block")
        attn = OwnAttentionSpec(DiffAttentionView(block, qkv, proj), **around)
    else:
        attn = AttentionSpec(
            block.num_heads,
            (qkv,),
            proj,
            block.head_dim,
            q_norm=norm(block.q_norm, "block.q_norm"),
            k_norm=norm(block.k_norm, "block.k_norm"),
            attention_dropout=modules.dropout(block.attn_drop, "block.attn_drop"),
            **around,
        )
    dim = block.in_proj.in_features
    return BlockSpec(dim, (attn,), (ffn,), parallel=True, drop_together=True, block=block)


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

    def tensors(self) -> list[torch.Tensor]:
        """Those of its own parts, and the lambdas, which are the block's."""
        (block,) = self.owner
        return tensors_at(block, (*_DIFF_PARTS, *_LAMBDAS))

    def build(self) -> nn.Module:
        """Return a ``DiffAttention`` of the block's own parts, as they are now."""
        (block,) = self.owner
        dim = block.in_proj.in_features
        attention = layers.DiffAttention(
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


# ---- models --------------------------------------------------------------------------------------

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
    if vit.pos_embed is None and vit.num_prefix_tokens:  # older ones forgot the tokens
        modules.require_version("timm", "1.0.26", "vit, with a class token but no positions,")


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

    stem_names = ("patch_embed",)

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

    def embeds_views(self) -> bool:
        """A backbone does. What updates statistics when it runs is no part of a graph, though."""
        stem = self.vit.patch_embed
        updates = any(getattr(m, "track_running_stats", False) for m in stem.modules())
        return type(stem) is not layers.PatchEmbed and not (stem.training and updates)


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
