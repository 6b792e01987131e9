# SPDX-License-Identifier: Apache-2.0
"""Encode all views of one or many images as one packed sequence."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn import timm_embedding
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import BlockSpec, read_block
from uhd_ops.nn.view_ratios import merge_by_ratio, times_of


@dataclass(frozen=True, eq=False)
class SliceTokens:
    """What a slice encoder returns.

    Attributes:
        tokens: Tokens of all views, ``(M, C)``: merged tokens if the model has a compressor.
        grids: Their grids, one for each view.
        prefix: Class and register tokens of each view, ``(S, P, C)``; P may be 0.
        views_per_image: Number of views of each image, in order.
    """

    tokens: torch.Tensor
    grids: PackedGrids
    prefix: torch.Tensor
    views_per_image: tuple[int, ...]

    def per_view(self) -> list[torch.Tensor]:
        """The tokens of each view, ``(h * w, C)``, without a copy."""
        return list(self.tokens.split(_lengths(self.grids)))

    def per_image(self) -> list[torch.Tensor]:
        """The tokens of each image, those of its views one after the other, without a copy."""
        lengths, images, first = _lengths(self.grids), [], 0
        for views in self.views_per_image:
            images.append(sum(lengths[first : first + views]))
            first += views
        return list(self.tokens.split(images))


class SliceEncoder(nn.Module):
    """Run a vision transformer on views of different sizes, packed into one sequence.

    No view is padded and none sees another: attention stays inside a view, everything else works on
    the packed tokens. Each view has its own class and register tokens, and position embeddings
    resampled to its own grid as timm's ``resample_abs_pos_embed`` does, whether or not the model
    was made with ``dynamic_img_size``. If :func:`uhd_ops.insert_early_compressor` was called on the
    model, the blocks behind the compressor work on merged tokens. Each view's result is that of
    ``vit.forward_features`` on the view alone, up to rounding. Blocks run by their parts, as
    :meth:`uhd_ops.nn.BlockSpec.run` says: adapted and quantised linear layers take effect, and
    hooks of linear layers and norms run, but those of the model, its blocks and their attention
    and MLP do not.

    Args:
        vit: timm's ``VisionTransformer``, with or without a compressor. It becomes a submodule; its
            parameters are shared, not copied.

    Raises:
        ImportError: timm is not installed.
        NotImplementedError: The model, its patch embedding or one of its blocks is not understood.

    Source:
        LLaVA-UHD v4, section 3.1: slice encoding.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> from uhd_ops import insert_early_compressor
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> encoder = SliceEncoder(insert_early_compressor(vit, layer=0))
        >>> result = encoder([torch.randn(3, 32, 48), torch.randn(3, 24, 16)])
        >>> result.grids, result.tokens.shape, result.prefix.shape
        (PackedGrids([(2, 3), (2, 1)]), torch.Size([8, 32]), torch.Size([2, 1, 32]))
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        timm_embedding.check_host(vit)
        self.vit = vit

    def forward(
        self,
        views: torch.Tensor | Sequence[torch.Tensor],
        grids: Grids | None = None,
        *,
        views_per_image: Sequence[int] | None = None,
        ratios: Sequence[int] | None = None,
    ) -> SliceTokens:
        """Encode views.

        Args:
            views: Normalised pixels in the dtype of the model: packed patches ``(N, 3, p, p)`` in
                raster order, as ``pack_views`` makes them, with their ``grids``; or a sequence of
                views ``(3, H, W)`` without ``grids``.
            grids: Patch grids of the packed patches.
            views_per_image: Number of views of each image, in order; None means that all views
                belong to one image.
            ratios: How far the compressor reduces each view: 1 keeps it, ``window²`` merges it
                once, ``window⁴`` twice; see :func:`uhd_ops.nn.merge_by_ratio`. None merges all
                once.

        Raises:
            NotImplementedError: In training, if the model has patch dropout.
            TypeError: An argument has the wrong type.
            ValueError: Shapes, grids or numbers do not fit together.
        """
        if grids is None:
            _check_views(views)
            pixels, grids = timm_embedding.to_patches(self.vit, views)
        else:
            pixels, grids = views, timm_embedding.check_patches(self.vit, views, grids)
        counts = _views_per_image(views_per_image, len(grids))
        self._refuse_dropout()
        self._check_ratios(ratios, len(grids))
        prefix, patches = timm_embedding.embed(self.vit, pixels, grids)
        tokens = _join(prefix, patches, grids)
        for block in self.vit.blocks:
            # Read anew in every call: adapters may have come, or a compressor.
            spec = read_block(block)
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                run = checkpoint(self._run, spec, tokens, grids, ratios, use_reentrant=False)
            else:
                run = self._run(spec, tokens, grids, ratios)
            tokens, grids = run
        prefix, patches = self._split(self.vit.norm(tokens), grids)
        return SliceTokens(patches, grids, prefix, counts)

    def _run(
        self,
        spec: BlockSpec,
        x: torch.Tensor,
        grids: PackedGrids,
        ratios: Sequence[int] | None,
    ) -> tuple[torch.Tensor, PackedGrids]:
        """Run one block on the packed sequence, and its compressor if it has one."""
        x = spec.run(x, ViewScope(grids, self.vit.num_prefix_tokens))
        compressor = getattr(spec.block, "compressor", None)
        if compressor is None:
            return x, grids
        prefix, patches = self._split(x, grids)
        if ratios is None:
            patches, grids = compressor(patches, grids), grids.merged(compressor.window)
        else:
            window = compressor.window
            patches, grids = merge_by_ratio(compressor, patches, grids, ratios, window=window)
        return _join(prefix, patches, grids), grids

    def _split(self, x: torch.Tensor, grids: PackedGrids) -> tuple[torch.Tensor, torch.Tensor]:
        """Undo :func:`_join`: the prefix tokens ``(S, P, C)`` and the patch tokens ``(N, C)``."""
        prefix = self.vit.num_prefix_tokens
        if prefix == 0 or len(grids) == 0:
            return x.new_empty((len(grids), prefix, x.shape[1])), x
        views = x.split(_lengths(grids, prefix))
        return torch.stack([v[:prefix] for v in views]), torch.cat([v[prefix:] for v in views])

    def _check_ratios(self, ratios: Sequence[int] | None, views: int) -> None:
        if ratios is None:
            return
        found = [block.compressor for block in self.vit.blocks if hasattr(block, "compressor")]
        if len(found) != 1:
            raise ValueError(f"ratios need a vit with one compressor, got one with {len(found)}")
        times_of(ratios, views, found[0].window)

    def _refuse_dropout(self) -> None:
        if self.vit.training and getattr(self.vit.patch_drop, "prob", 0.0):
            raise NotImplementedError(
                "patch dropout leaves no grid: set vit.patch_drop to torch.nn.Identity()"
            )


def _join(prefix: torch.Tensor, patches: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
    """Put each view's prefix tokens in front of its patches."""
    if prefix.shape[1] == 0:
        return patches
    if prefix.shape[0] == 0:  # class and register tokens get their zero gradient all the same
        return torch.cat([patches, prefix.flatten(0, 1)])
    views = zip(prefix, patches.split(_lengths(grids)), strict=True)
    return torch.cat([tokens for view in views for tokens in view])


def _lengths(grids: PackedGrids, prefix: int = 0) -> list[int]:
    return [prefix + height * width for height, width in grids]


def _check_views(views: Sequence[torch.Tensor]) -> None:
    if isinstance(views, torch.Tensor) or not isinstance(views, Sequence):
        raise TypeError(
            "views must be a sequence of (3, H, W) tensors, or packed patches with their grids; "
            f"got {type(views).__name__} without grids"
        )


def _count(number: int) -> int:
    if isinstance(number, bool):
        raise TypeError("a bool is no number of views")
    return operator.index(number)


def _views_per_image(counts: Sequence[int] | None, views: int) -> tuple[int, ...]:
    if counts is None:
        return (views,)
    try:
        counts = tuple(_count(n) for n in counts)
    except TypeError as error:
        raise TypeError(f"views_per_image must hold ints, got {counts!r}") from error
    if any(n < 0 for n in counts) or sum(counts) != views:
        raise ValueError(f"views_per_image must add up to {views} views, got {counts}")
    return counts
