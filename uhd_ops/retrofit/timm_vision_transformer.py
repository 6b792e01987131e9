# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer`` with a compressor behind one block.

The classes of the model and of one block change in place; no module is added to ``blocks``, so
every index and every parameter name stays. Why, and what else was considered: docs/adr/0003.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.weak import WeakTensorKeyDictionary

from uhd_ops.nn.early_compressor import EarlyCompressor
from uhd_ops.retrofit.config import EarlyCompressorConfig

# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class TokenLayout(NamedTuple):
    """How a sequence of tokens is made up: ``prefix`` tokens, then ``height * width`` patches."""

    height: int
    width: int
    prefix: int


# A block sees tokens only, and their number does not tell the grid. The model, which sees the
# image, leaves the layout here for the time of its forward pass; each thread has its own.
_LAYOUT: ContextVar[TokenLayout | None] = ContextVar("layout of the running forward", default=None)
# Gradient checkpointing runs a block again during the backward pass, when no model is running: the
# tokens that went into the block are then the same tensor, which leads back to their layout.
_LAYOUT_OF_TOKENS = WeakTensorKeyDictionary()


class CompressedBlock(Block):
    """A timm Block whose patch tokens are merged after its own body.

    Attributes:
        compressor: The module that merges them.
        layout_while_tracing: Stands in for the context variable under torch.compile, which cannot
            trace one; None otherwise.
    """

    body_class = Block
    compressor: EarlyCompressor
    layout_while_tracing: TokenLayout | None = None

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        _refuse_masks(attn_mask, is_causal)
        height, width, prefix = self._layout_of(x)
        if x.shape[1] != prefix + height * width:
            raise ValueError(
                f"x must hold {prefix} prefix tokens and {height} x {width} patches, "
                f"{prefix + height * width} tokens, got shape {tuple(x.shape)}"
            )
        x = super().forward(x)
        merged = self.compressor(x[:, prefix:], (height, width))
        return torch.cat([x[:, :prefix], merged], dim=1) if prefix else merged

    def _layout_of(self, x: torch.Tensor) -> TokenLayout:
        layout = self.layout_while_tracing
        if layout is None and not torch.compiler.is_compiling():
            layout = _LAYOUT.get()
            if layout is None:
                layout = _LAYOUT_OF_TOKENS.get(x)
            elif torch.is_grad_enabled():
                _LAYOUT_OF_TOKENS[x] = layout
        if layout is None:
            raise RuntimeError(
                "the patch grid of these tokens is not known: a block with a compressor runs in "
                "the forward pass of its model; if it is checkpointed, then alone or with the "
                "whole model, with use_reentrant=False and no save_on_cpu around it"
            )
        return layout


class CompressedVisionTransformer(VisionTransformer):
    """The methods that a compressed model replaces; mixed into the model's own class."""

    original_class: type[VisionTransformer] = VisionTransformer
    early_compressor: EarlyCompressorConfig

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """As in the model's class; the patch tokens returned are the merged ones."""
        return self._run(super().forward_features, x, attn_mask, is_causal)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in the model's class; maps from the compressed block on have the merged grid."""
        options = {
            "indices": indices,
            "return_prefix_tokens": return_prefix_tokens,
            "norm": norm,
            "stop_early": stop_early,
            "intermediates_only": intermediates_only,
            "output_dict": output_dict,
        }
        method = functools.partial(super().forward_intermediates, **options)
        if output_fmt != "NCHW":
            method = functools.partial(method, output_fmt=output_fmt)
            return self._run(method, x, attn_mask, is_causal)
        # The class would give every intermediate the fine grid: a quarter of the channels each.
        method = functools.partial(method, output_fmt="NLC")
        result = self._run(method, x, attn_mask, is_causal)
        to_map = functools.partial(self._to_map, self._layout(x))
        if output_dict:
            result["image_intermediates"] = [to_map(y) for y in result["image_intermediates"]]
            return result
        if intermediates_only:
            return [to_map(y) for y in result]
        return result[0], [to_map(y) for y in result[1]]

    def _run(
        self, method: Callable, x: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> Any:
        """Call ``method(x)`` while the compressed block knows the layout of the tokens."""
        _refuse_masks(attn_mask, is_causal)
        if self.training and getattr(self.patch_drop, "prob", 0.0):
            raise NotImplementedError(
                "patch dropout leaves no grid to merge windows of: set vit.patch_drop to "
                "torch.nn.Identity(), or remove the compressor"
            )
        layout = self._layout(x)
        if not torch.compiler.is_compiling():
            token = _LAYOUT.set(layout)
            try:
                return method(x)
            finally:
                _LAYOUT.reset(token)
        blocks = self._compressed_blocks()
        for block in blocks:
            block.layout_while_tracing = layout
        try:
            return method(x)
        finally:
            for block in blocks:
                block.layout_while_tracing = None

    def _compressed_blocks(self) -> list[CompressedBlock]:
        """Find the compressed block; it is gone where pruning cut off the blocks from there on."""
        found = [block for block in self.blocks if isinstance(block, CompressedBlock)]
        # Wrapped blocks, such as those of activation checkpointing, hide one level down.
        return found or [m for m in self.blocks.modules() if isinstance(m, CompressedBlock)]

    def _layout(self, x: torch.Tensor) -> TokenLayout:
        height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return TokenLayout(height, width, self.num_prefix_tokens)

    def _to_map(self, layout: TokenLayout, y: Any) -> Any:
        """``(B, L, C)`` to ``(B, C, h, w)`` on the fine or the merged grid, whichever has L."""
        if isinstance(y, tuple):  # with prefix tokens
            return self._to_map(layout, y[0]), *y[1:]
        height, width, window = layout.height, layout.width, self.early_compressor.window
        if y.shape[1] != height * width:
            height, width = -(-height // window), -(-width // window)
        return y.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        """Show what was inserted."""
        return f"early_compressor={self.early_compressor}"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if "original_class" not in vars(type(self)):  # somebody extended ours: that is theirs
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so it is pickled by the class that it extends.
        _, _, *state = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (self.original_class,), *state


def insert(vit: VisionTransformer, config: EarlyCompressorConfig) -> VisionTransformer:
    """Insert the compressor; everything that can fail comes before the first change."""
    config.check_depth(len(vit.blocks))
    _check_model(vit)
    block = vit.blocks[config.layer]
    compressor = EarlyCompressor.from_block(
        block, window=config.window, form=config.form, attention=config.attention
    )
    block.__class__ = CompressedBlock
    block.compressor = compressor
    vit.__class__ = _compressed_class(type(vit))
    vit.early_compressor = config
    for info in vit.feature_info[config.layer :]:
        info["reduction"] *= config.window
    return vit


def remove(vit: VisionTransformer) -> VisionTransformer:
    """Undo :func:`insert`."""
    config, blocks = vit.early_compressor, vit._compressed_blocks()
    for module, ours in ((vit, "original_class"), *((block, "body_class") for block in blocks)):
        if ours not in vars(type(module)):
            raise NotImplementedError(
                "vit and its blocks must have the classes that the insertion gave them, got "
                f"{type(module).__name__}: undo what extended it (a parametrization, say) first"
            )
    for block in blocks:
        del block.compressor
        vars(block).pop("layout_while_tracing", None)
        block.__class__ = block.body_class
    for info in vit.feature_info[config.layer :]:
        info["reduction"] //= config.window
    del vit.early_compressor
    vit.__class__ = vit.original_class
    return vit


def _check_model(vit: VisionTransformer) -> None:
    name = type(vit).__name__
    for method in _METHODS:
        if method in vars(vit) or getattr(type(vit), method) is not getattr(
            VisionTransformer, method
        ):
            raise NotImplementedError(
                f"vit must leave VisionTransformer.{method} as it is, but {name} replaces it"
            )
    embed = vit.patch_embed
    size = getattr(embed, "dynamic_feat_size", None)
    if size is None or embed.img_size is None or size(embed.img_size) != tuple(embed.grid_size):
        raise NotImplementedError(
            f"vit.patch_embed must tell its patch grid by dynamic_feat_size, as PatchEmbed does; "
            f"{type(embed).__name__} does not"
        )


def _refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        argument = "attn_mask must be None" if attn_mask is not None else "is_causal must be False"
        raise NotImplementedError(
            f"{argument} in a model with a compressor, which changes the number of tokens"
        )


@functools.cache
def _compressed_class(cls: type[VisionTransformer]) -> type[VisionTransformer]:
    """Return ``cls`` with the methods of CompressedVisionTransformer in front of its own."""
    if cls is VisionTransformer:
        return CompressedVisionTransformer
    name = f"Compressed{cls.__name__}"
    namespace = {"__module__": cls.__module__, "original_class": cls}
    return type(name, (CompressedVisionTransformer, cls), namespace)


def _new(cls: type[VisionTransformer]) -> VisionTransformer:
    """Make an empty compressed model, for pickle and copy."""
    compressed = _compressed_class(cls)
    return compressed.__new__(compressed)
