# SPDX-License-Identifier: Apache-2.0
"""Encode all views of one or many images as one packed sequence."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from uhd_ops import _checks
from uhd_ops.grids import Grids, PackedGrids, TracedGrids, brief
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import BlockSpec, families
from uhd_ops.nn.positions import Rotary
from uhd_ops.nn.traced_parts import register
from uhd_ops.nn.view_ratios import Merge, ViewRatios
from uhd_ops.windows import join_prefix, split_prefix

Positions = Literal["resample", "nearest"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)


@dataclass(frozen=True, eq=False)
class SliceTokens:
    """Result of a :class:`SliceEncoder`.

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

    def __repr__(self) -> str:
        tokens, prefix = tuple(self.tokens.shape), tuple(self.prefix.shape)
        return (
            f"SliceTokens(tokens={tokens}, grids={self.grids!r}, prefix={prefix}, "
            f"views_per_image=({brief(self.views_per_image)},), dtype={self.tokens.dtype}, "
            f"device='{self.tokens.device}')"
        )

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
    the packed tokens. Each view's result is that of the model's own ``forward_features`` (the last
    hidden state in transformers) on the view alone, up to rounding, for a view of another size than
    the model's after ``set_input_size``, ``dynamic_img_size`` or ``interpolate_pos_encoding``,
    whichever the model has. So each view has its own class and register tokens, and positions of
    its own grid: learned ones resampled, rotary embeddings, tables of relative positions resized.
    If a compressor was inserted into the model, the blocks after it work on merged tokens. Forward
    hooks of linear layers and norms run, but those of the model, its blocks and their attention
    and MLP do not. At most three graphs of torch.compile serve all grids, and one of torch.export
    all of two views or more; with ratios, where they are :class:`uhd_ops.nn.ViewRatios`. Positions,
    and attention that is not a plain softmax over scores, are computed by the model itself when a
    graph runs, so the encoder must still be there: an exported program runs in the process that
    made it. In training, such attention is computed once more in the backward pass.

    Args:
        vit: Any model that :func:`uhd_ops.insert_early_compressor` takes, with or without a
            compressor: the vision transformers of timm in docs/models.md, those of transformers,
            and classes that ``register_family`` was told how to embed. It becomes a submodule; its
            parameters are shared, not copied.
        positions: How a learned table of position embeddings is fitted to the grid of a view.
            ``"resample"`` does what the model does; ``"nearest"`` takes no mixture but the nearest
            position below: patch i of n that of row, or column, ``floor(i * S / n)`` of S, the rule
            of the tower of MiniCPM-V 4.6.

    Raises:
        NotImplementedError: The model, its patch embedding or one of its blocks is not understood.
        TypeError: ``vit`` is not a module.
        ValueError: ``positions`` is neither of the two; or ``"nearest"`` for a model that has not
            one learned position embedding for each patch.

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

    def __init__(self, vit: nn.Module, positions: Positions = "resample") -> None:
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f'positions must be "resample" or "nearest", got "{positions}"')
        registry = families()
        registry.check_packed(vit)
        if positions == "nearest":
            transformer, packed = registry.packed_of(vit)
            packed(transformer, PackedGrids([])).require_learned()
        self.vit, self.positions = vit, positions
        self._number = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, which graphs find by a number of its own."""
        super().__setstate__(state)
        self._number = register(self)

    def forward(
        self,
        views: torch.Tensor | Sequence[torch.Tensor],
        grids: Grids | None = None,
        *,
        views_per_image: Sequence[int] | None = None,
        ratios: Sequence[int] | ViewRatios | None = None,
    ) -> SliceTokens:
        """Encode views.

        Args:
            views: Normalised pixels in the dtype of the model: packed patches ``(N, 3, p, p)`` in
                raster order, as ``pack_views`` makes them, with their ``grids``; or a sequence of
                views ``(3, H, W)`` without ``grids``. Gemma 4 takes pixels from 0 to 1.
            grids: Patch grids of the packed patches.
            views_per_image: Number of views of each image, in order; None means that all views
                belong to one image.
            ratios: How far the compressor reduces each view: 1 keeps it, ``window²`` merges it
                once, ``window⁴`` twice; see :func:`uhd_ops.nn.merge_by_ratio`. None merges all
                once. As :class:`uhd_ops.nn.ViewRatios` they are data to a compiled encoder.

        Raises:
            NotImplementedError: In training, if the model has patch dropout.
            TypeError: An argument has the wrong type.
            ValueError: Shapes, grids or numbers do not fit together.
        """
        vit, packed = families().packed_of(self.vit)
        patch = _Patch.of(vit, packed)
        if grids is None:
            pixels, grids = patch.cut(views)
        else:
            pixels, grids = views, patch.check(views, grids)
        counts = _views_per_image(views_per_image, grids.num_views)
        packed.refuse_dropout(vit)
        if ratios is not None:
            ratios = ViewRatios.of(ratios, grids, self._window(vit, packed))
        if grids.num_views:
            return SliceTokens(*self._encode(self.packed(grids), pixels, ratios), counts)
        # Data-parallel training waits for a gradient of every parameter, from a rank without views
        # too: so one is encoded and left out.
        blank = pixels.new_zeros((1, *pixels.shape[1:]))
        one = self.packed(PackedGrids([(1, 1)]))
        tokens, _, prefix = self._encode(one, blank, None)
        return SliceTokens(tokens[:0], grids, prefix[:0], counts)

    if TYPE_CHECKING:  # nn.Module says that a call returns anything

        def __call__(
            self,
            views: torch.Tensor | Sequence[torch.Tensor],
            grids: Grids | None = None,
            *,
            views_per_image: Sequence[int] | None = None,
            ratios: Sequence[int] | None = None,
        ) -> SliceTokens:
            """:meth:`forward`, and the hooks."""
            ...

    def packed(self, grids: PackedGrids) -> Any:
        """Return the model on views with these grids, a ``uhd_ops.retrofit.packed.PackedModel``."""
        vit, packed = families().packed_of(self.vit)
        return packed(vit, grids, self._number)

    def _encode(
        self, model: Any, pixels: torch.Tensor, ratios: ViewRatios | None
    ) -> tuple[torch.Tensor, PackedGrids, torch.Tensor]:
        """Return tokens, their grids, and prefix tokens.

        Args:
            model: A ``uhd_ops.retrofit.packed.PackedModel``.
            pixels: Packed patches of at least one view.
            ratios: Those of the views, if any.
        """
        prefix, patches = model.embed(pixels, self.positions)
        x, sides = join_prefix(prefix, patches, model.grids), 1
        for index, block in enumerate(model.blocks):
            # Read anew in every call: adapters may have come, or a compressor.
            spec = model.spec(index)
            # Out here, because a checkpointed block must not find made what it made the first time.
            merge = model.merge(index, sides, ratios) if hasattr(block, "compressor") else None
            scope = model.scope(index, sides, prefix.shape[1])
            positions = model.rotary(index, sides, prefix.shape[1])
            arguments = spec, x, scope, positions, merge, prefix.shape[1]
            if model.checkpoints(index) and torch.is_grad_enabled():
                x = checkpoint(_run, *arguments, use_reentrant=False)
            else:
                x = _run(*arguments)
            sides = sides if merge is None else merge.sides
        grids = model.merged_grids(sides)
        prefix, patches = split_prefix(x, grids, prefix.shape[1])
        prefix, patches = model.end(prefix, patches, sides)
        return patches, grids, prefix

    @staticmethod
    def _window(vit: nn.Module, packed: type) -> int:
        """Side of the windows of the one compressor."""
        blocks = vit.get_submodule(packed.blocks_name)
        found = [block.compressor for block in blocks if hasattr(block, "compressor")]
        if len(found) != 1:
            raise ValueError(f"ratios need a vit with one compressor, got one with {len(found)}")
        return found[0].window

    def extra_repr(self) -> str:
        """Show the options."""
        return f"positions={self.positions!r}"


def _run(
    spec: BlockSpec,
    x: torch.Tensor,
    scope: ViewScope,
    positions: Rotary | None,
    merge: Merge | None,
    prefix: int,
) -> torch.Tensor:
    """Run one block on the packed sequence, and its compressor if it has one."""
    x = spec.run(x, scope, positions)
    if merge is None:
        return x
    in_front, patches = split_prefix(x, merge.grids, prefix)
    return join_prefix(in_front, *merge(patches))


def _lengths(grids: PackedGrids) -> list[int]:
    return [height * width for height, width in grids]


@dataclass(frozen=True, eq=False)
class _Patch:
    """The patches that a model takes.

    Attributes:
        shape: ``(channels, height, width)``, in px.
        like: A parameter of the model.
        pads: Whether the model pads images to whole patches.
    """

    shape: tuple[int, int, int]
    like: torch.Tensor
    pads: bool

    @classmethod
    def of(cls, vit: nn.Module, packed: type) -> _Patch:
        """The patches of a model."""
        shape = packed.channels(vit), *packed.patch_size(vit)
        return cls(shape, packed.like(vit), packed.pads(vit))

    def cut(self, views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, PackedGrids]:
        """Cut views ``(3, H, W)`` of any sizes into patches ``(N, 3, p, p)``, raster order."""
        if isinstance(views, torch.Tensor) or not isinstance(views, Sequence):
            raise TypeError(
                "views must be a sequence of (3, H, W) tensors, or packed patches with their "
                f"grids; got {type(views).__name__} without grids"
            )
        _, rows, cols = self.shape
        patches, grids = [self.like.new_empty((0, *self.shape))], []
        for index, view in enumerate(views):
            self._check_view(view, f"views[{index}]")
            view = functional.pad(view, (0, -view.shape[2] % cols, 0, -view.shape[1] % rows))
            grid = view.shape[1] // rows, view.shape[2] // cols
            tiles = view.unflatten(2, (grid[1], cols)).unflatten(1, (grid[0], rows))
            patches.append(tiles.permute(1, 3, 0, 2, 4).flatten(0, 1))
            grids.append(grid)
        return torch.cat(patches[bool(grids) :]), PackedGrids(grids)

    def check(self, pixels: torch.Tensor, grids: Grids) -> PackedGrids:
        """Check packed patches against the model and their grids."""
        self._check_pixels(pixels, "views")
        grids = PackedGrids.of(grids)
        if torch.compiler.is_compiling():
            grids = TracedGrids.of(grids)
        if grids.has_empty_views:
            raise ValueError(f"grids must hold a patch for each view, got {list(grids)}")
        expected = (grids.num_tokens, *self.shape)
        if not grids.is_known and pixels.dim() == 4:  # torch.export: compared in the graph
            torch._check(pixels.shape[0] == expected[0])
            expected = (pixels.shape[0], *self.shape)
        if pixels.shape != expected:
            raise ValueError(
                f"views must be (N, 3, p, p) = {expected} for these grids and this model, got "
                f"shape {tuple(pixels.shape)}"
            )
        return grids

    def _check_view(self, view: torch.Tensor, name: str) -> None:
        self._check_pixels(view, name)
        channels, rows, cols = self.shape
        if view.dim() != 3 or view.shape[0] != channels or 0 in view.shape:
            raise ValueError(f"{name} must be ({channels}, H, W), got shape {tuple(view.shape)}")
        whole = view.shape[1] % rows == 0 and view.shape[2] % cols == 0
        if not (whole or self.pads):
            raise ValueError(
                f"{name} must have sides that are multiples of the patch, {rows} x {cols} px, got "
                f"{view.shape[1]} x {view.shape[2]} px (height x width)"
            )

    def _check_pixels(self, pixels: torch.Tensor, name: str) -> None:
        _checks.check_tensor(pixels, name)
        device = pixels.device.type
        autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        if not autocast:
            _checks.check_like(pixels, name, self.like, "the model's parameters")


def _count(number: int) -> int:
    if isinstance(number, bool):
        raise TypeError("a bool is not a number of views")
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
