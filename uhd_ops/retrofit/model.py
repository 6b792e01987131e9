# SPDX-License-Identifier: Apache-2.0
"""What the class of a model with a compressor becomes, and what a family says about itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from uhd_ops._reclass import Mixed
from uhd_ops.nn.block_spec import BlockSpec, read_block
from uhd_ops.nn.positions import Frequencies
from uhd_ops.retrofit.blocks import (
    CoarseBlock,
    CoarsePart,
    CompressedBlock,
    LayoutAware,
)
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.layout import TokenLayout, run_with


class Compressed(Mixed):
    """A model that knows what was inserted.

    Attributes:
        early_compressor: The options of the insertion.
    """

    prefix = "Compressed"
    early_compressor: Config

    def _remember(self, config: Config) -> None:
        """Note what was inserted."""
        self.early_compressor = config

    def _forget(self) -> None:
        """Undo :meth:`_remember`."""
        del self.early_compressor


class CompressedModel(Compressed):
    """What all models with a compressor share; a family's mixin adds the methods to replace."""

    blocks_name = "blocks"

    def _run(self, layout: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` while the blocks know the layout of the tokens."""
        if not torch.compiler.is_compiling():
            return run_with(layout, method, *args, **kwargs)
        blocks = self._changed_blocks()
        for block in blocks:
            block.layout_while_tracing = layout
        try:
            return method(*args, **kwargs)
        finally:
            for block in blocks:
                block.layout_while_tracing = None

    def _changed_blocks(self) -> list[LayoutAware]:
        """Find the changed blocks; they are gone where pruning cut off the blocks from there on."""
        blocks = self.get_submodule(self.blocks_name)
        found = [block for block in blocks if isinstance(block, LayoutAware)]
        # Wrapped blocks, such as those of activation checkpointing, hide one level down.
        found = found or [m for m in blocks.modules() if isinstance(m, LayoutAware)]
        return found + [m for m in self.children() if isinstance(m, LayoutAware)]

    def _behind(self, layout: Any) -> Any:
        """The layout of what leaves the last block, given that in front of the compressor."""
        return layout.merged(self._windows()[-1])

    def _windows(self) -> list[int]:
        """Sides of the windows that became one token, in fine tokens, after each merge."""
        sides = [1]
        for block in self._changed_blocks():
            if isinstance(block, CompressedBlock):
                sides.append(sides[-1] * block.compressor.window)
        return sides

    def _intermediates(
        self,
        layout: TokenLayout,
        method: Callable[..., Any],
        x: torch.Tensor,
        *,
        output_fmt: str,
        intermediates_only: bool,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Call timm's ``forward_intermediates``; each map gets the grid that it has.

        The original would give every intermediate the fine grid: a quarter of the channels each,
        without an error.
        """
        options["intermediates_only"] = intermediates_only
        if output_dict:
            options["output_dict"] = True
        if output_fmt != "NCHW":
            return self._run(layout, method, x, output_fmt=output_fmt, **options)
        result = self._run(layout, method, x, output_fmt="NLC", **options)
        to_map = functools.partial(self._to_map, layout)
        if output_dict:
            result["image_intermediates"] = [to_map(y) for y in result["image_intermediates"]]
            return result
        if intermediates_only:
            return [to_map(y) for y in result]
        return result[0], [to_map(y) for y in result[1]]

    def _to_map(self, layout: TokenLayout, y: Any) -> Any:
        """``(B, L, C)`` to ``(B, C, h, w)`` on the fine or the merged grid, whichever has L."""
        if isinstance(y, tuple):  # with prefix tokens
            return self._to_map(layout, y[0]), *y[1:]
        return self._to_grid(layout, y).permute(0, 3, 1, 2).contiguous()

    def _to_grid(self, layout: TokenLayout, y: torch.Tensor) -> torch.Tensor:
        """``(B, L, C)`` to ``(B, h, w, C)``; likewise."""
        grids = [layout.merged(window).grid for window in self._windows()]
        fitting = (grid for grid in grids if grid[0] * grid[1] == y.shape[1])
        return y.unflatten(1, next(fitting, grids[-1]))

    def extra_repr(self) -> str:
        """Show what was inserted."""
        return f"early_compressor={self.early_compressor}"


class CompressedWrapper(Compressed):
    """A model around the transformer that holds the compressor, such as a classifier."""


def encoder_or_self(vit: nn.Module) -> nn.Module:
    """Return the transformer of a model that may be one or hold one as ``encoder``."""
    return getattr(vit, "encoder", vit)


@dataclass(frozen=True)
class Family:
    """How models of one class take a compressor.

    Attributes:
        model: Mixin for the model.
        compressed: Mixin for block ``layer``.
        coarse: Mixin for the blocks behind it, or None where they can stay as they are.
        check: Refuses a model that is not understood, before anything is changed.
        parts: Mixins for submodules of the blocks behind, by name; a block may lack any of them.
        read: ``read(vit, block)`` reads block ``layer``.
        transformer: Finds the transformer in the model that the user has, which may wrap it.
        wrapper: Mixin for a model that does.
        heads: Mixins for submodules of the transformer, by name; it may lack any of them.
    """

    model: type[CompressedModel]
    compressed: type[CompressedBlock]
    coarse: type[CoarseBlock] | None
    check: Callable[[nn.Module, Config], None]
    parts: Mapping[str, type[CoarsePart]] = field(default_factory=dict)
    read: Callable[[nn.Module, nn.Module], BlockSpec] = lambda vit, block: read_block(block)
    transformer: Callable[[nn.Module], nn.Module] = lambda vit: vit
    wrapper: type[CompressedWrapper] = CompressedWrapper
    heads: Mapping[str, type[CoarseBlock]] = field(default_factory=dict)


def require_methods(vit: nn.Module, cls: type, methods: tuple[str, ...]) -> None:
    """Refuse a model whose class or instance replaces a method that the compressor relies on."""
    for method in methods:
        if method in vars(vit) or getattr(type(vit), method) is not getattr(cls, method):
            raise NotImplementedError(
                f"vit must leave {cls.__name__}.{method} as it is, but {type(vit).__name__} "
                "replaces it"
            )


def refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    """Refuse masks: they are made for the fine sequence."""
    if attn_mask is not None or is_causal:
        argument = "attn_mask must be None" if attn_mask is not None else "is_causal must be False"
        raise NotImplementedError(
            f"{argument} in a model with a compressor, which changes the number of tokens"
        )


def refuse_patch_dropout(vit: nn.Module) -> None:
    """Refuse patch dropout in training."""
    if vit.training and getattr(getattr(vit, "patch_drop", None), "prob", 0.0):
        raise NotImplementedError(
            "patch dropout leaves no grid to merge windows of: set "
            "vit.patch_drop.prob = 0, or remove the compressor"
        )


def image_layout(
    vit: nn.Module, x: torch.Tensor, prefix: int, frequencies: Frequencies | None = None
) -> TokenLayout:
    """Return the layout of images ``(B, C, H, W)``, as the model's patch embedding cuts them."""
    refuse_patch_dropout(vit)
    height, width = vit.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
    return TokenLayout(height, width, prefix, frequencies)
