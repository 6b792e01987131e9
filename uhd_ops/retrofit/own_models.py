# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of the caller's own: a family for one class, given by a few functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, SupportsIndex

import torch
from torch import nn

from uhd_ops._checks import check_int, check_positive_int
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import Model, blocks_at, is_mixed, mixed, require_own_forward
from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.adapter import (
    CompressedBlock,
    CompressedModel,
    Family,
    TokenLayout,
    require_methods,
)
from uhd_ops.retrofit.packed import PackedModel, Sides
from uhd_ops.retrofit.registry import OWN, is_built_in


def register_family(
    cls: type[Model],
    *,
    blocks: str,
    read_block: Callable[[nn.Module], BlockSpec],
    grid: Callable[..., tuple[int, int]],
    prefix_tokens: int = 0,
    layout: Literal["NLC", "LNC"] = "NLC",
    methods: Sequence[str] = ("forward",),
    patch_shape: Callable[[nn.Module], Sequence[int]] | None = None,
    embed: Callable[..., tuple[torch.Tensor | None, torch.Tensor]] | None = None,
    finish: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> type[Model]:
    """Let the library work on a class of vision transformers of your own.

    Afterwards :func:`uhd_ops.insert_early_compressor`, ``insert_progressive_compression``, their
    removal, copying, pickling, gradient checkpointing, ``torch.compile``, ``load_plain_checkpoint``
    and ``flops.count_forward`` work on its instances as on those of timm. Its blocks must get
    tokens that have their positions already: anything else that a block is called with is passed
    on, and the blocks after the compressor get it too. With ``patch_shape`` and ``embed``,
    :class:`uhd_ops.nn.SliceEncoder` takes them as well. docs/own_vit.md works through two models.

    Args:
        cls: Class of the model. Its subclasses belong to it, unless they replace one of
            ``methods``.
        blocks: Dotted name of the ``ModuleList`` of blocks inside the model.
        read_block: ``read_block(block)`` names the parts of a block. The compressor starts from
            copies of them; the block itself stays as it is.
        grid: ``grid(model, **arguments)`` returns ``(h, w)``, the rows and columns of patches; the
            arguments are those of the method called, by name, with its defaults.
        prefix_tokens: Tokens in front of the patches, such as a class token.
        layout: ``"NLC"`` if the blocks take ``(B, L, C)``, ``"LNC"`` for ``(L, B, C)``.
        methods: Methods of the model that run the blocks and are called from outside.
        patch_shape: ``patch_shape(model)`` returns ``(channels, height, width)`` of a patch.
        embed: ``embed(model, patches, grids)`` returns what enters the first block: the prefix
            tokens ``(S, P, C)`` of S views, None if there are none, and the tokens ``(N, C)`` of
            packed patches ``(N, channels, height, width)``, view by view in raster order, with
            their positions; ``grids`` are :class:`uhd_ops.PackedGrids`.
        finish: ``finish(model, prefix, tokens)`` returns what becomes of both after the last
            block; None if nothing does.

    Returns:
        ``cls`` itself.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``cls`` belongs to a family of this package, lacks one of ``methods``, an
            argument is out of range, or one of ``patch_shape`` and ``embed`` is missing.

    Example:
        >>> import torch, uhd_ops
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.mlp_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        ...         self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        ...         self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        ...     def forward(self, x):
        ...         y = self.norm(x)
        ...         x = x + self.attention(y, y, y, need_weights=False)[0]
        ...         return x + self.mlp(self.mlp_norm(x))
        >>> class Tower(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Conv2d(3, 32, 8, 8)
        ...         self.blocks = nn.ModuleList(Block() for _ in range(2))
        ...     def forward(self, images):
        ...         x = self.embed(images).flatten(2).transpose(1, 2)
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> from uhd_ops.nn import AttentionSpec, BlockSpec, MlpSpec, WeightView
        >>> def read(block):
        ...     attention = AttentionSpec(
        ...         num_heads=2,
        ...         projections=(WeightView(block.attention, "in_proj_weight", "in_proj_bias"),),
        ...         proj=WeightView(block.attention.out_proj, "weight", "bias"),
        ...         head_dim=16,
        ...         norm=block.norm,
        ...     )
        ...     mlp = MlpSpec(block.mlp[0], block.mlp[2], "gelu", norm=block.mlp_norm)
        ...     return BlockSpec(32, (attention,), (mlp,), block=block)
        >>> def grid(tower, images):
        ...     return images.shape[-2] // 8, images.shape[-1] // 8
        >>> _ = uhd_ops.register_family(Tower, blocks="blocks", read_block=read, grid=grid)
        >>> tower = uhd_ops.insert_early_compressor(Tower(), layer=0)
        >>> tower(torch.randn(1, 3, 32, 48)).shape  # 4 x 6 patches, 2 x 3 after the compressor
        torch.Size([1, 6, 32])
    """
    _check(cls, blocks, layout, methods)
    required = {"read_block": read_block, "grid": grid}
    optional = {"patch_shape": patch_shape, "embed": embed, "finish": finish}
    _check_functions(required | {n: f for n, f in optional.items() if f is not None})
    if (patch_shape is None) != (embed is None) or (embed is None and finish is not None):
        given = ", ".join(name for name, function in optional.items() if function is not None)
        raise ValueError(
            f"patch_shape and embed must be given together, and with finish, got {given} alone"
        )
    prefix_tokens = check_int(prefix_tokens, "prefix_tokens", 0)
    made = {
        "__doc__": f"A {cls.__name__} with a compressor.",
        "__module__": __name__,
        "blocks_name": blocks,
        "_grid_of": staticmethod(grid),
        "_prefix_tokens": prefix_tokens,
        "_layout_class": TokenLayout if layout == "NLC" else SequenceFirstLayout,
        "adapted": dict.fromkeys(methods, "_run"),
    }

    def read(vit: nn.Module, block: nn.Module) -> BlockSpec:
        spec = read_block(block)
        if not isinstance(spec, BlockSpec):
            raise TypeError(f"read_block must return an nn.BlockSpec, got {type(spec).__name__}")
        return spec

    packed = {
        "__doc__": f"A {cls.__name__} on packed views.",
        "__module__": __name__,
        "blocks_name": blocks,
        "_read_block": staticmethod(read),
        "_prefix_tokens": prefix_tokens,
        **{f"_{name}": function and staticmethod(function) for name, function in optional.items()},
    }
    OWN[cls] = Family(
        type(f"Own{cls.__name__}", (OwnModel,), made),
        OwnBlock,
        None,
        functools.partial(_check_model, cls, blocks, tuple(methods)),
        read=read,
        packed=type(f"Packed{cls.__name__}", (OwnPacked,), packed),
    )
    return cls


class SequenceFirstLayout(TokenLayout):
    """A sequence ``(P + h*w, B, C)``."""

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` has as many tokens."""
        return super().holds(x.transpose(0, 1))

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the patches; prefix tokens pass unchanged."""
        return super().merge(x.transpose(0, 1), compressor, positions).transpose(0, 1)


class OwnModel(CompressedModel):
    """A registered model; each class that is registered has a subclass of this."""

    _grid_of: ClassVar[Callable[..., tuple[int, int]]]
    _prefix_tokens: ClassVar[int]
    _layout_class: ClassVar[type[TokenLayout]]

    def _layout(self, **arguments: Any) -> TokenLayout:
        height, width = self._grid_of(self, **arguments)
        return self._layout_class(height, width, self._prefix_tokens)

    def _layout_of_every_image(self) -> None:
        return None

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        """By the registered class: what stands in front of it is made where it is registered."""
        function, arguments, *state = super().__reduce_ex__(protocol)
        if not is_mixed(type(self)):
            return function, arguments, *state
        return _new, (type(self).body_class,), *state


def _new(cls: type[nn.Module]) -> nn.Module:
    """Make an empty model with a compressor, for pickle and copy."""
    registered = next((base for base in cls.__mro__ if base in OWN), None)
    if registered is None:
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__} must be registered by uhd_ops.register_family "
            "before one with a compressor is loaded"
        )
    made = mixed(OWN[registered].model, cls)
    return made.__new__(made)


class OwnBlock(CompressedBlock):
    """Block ``layer``."""


class OwnPacked(PackedModel):
    """A registered model on packed views; each class that is registered has a subclass of this."""

    position_names = ()
    _read_block: ClassVar[Callable[[nn.Module, nn.Module], BlockSpec]]
    _patch_shape: ClassVar[Callable[[nn.Module], Sequence[int]] | None]
    _embed: ClassVar[Callable[..., tuple[torch.Tensor | None, torch.Tensor]] | None]
    _finish: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]] | None]
    _prefix_tokens: ClassVar[int]

    @classmethod
    def check(cls, vit: nn.Module) -> None:
        """Refuse a class that was registered without what this needs."""
        if cls._embed is None:
            raise NotImplementedError(
                f"nothing says how {type(vit).__name__} embeds packed views: register its class "
                "with patch_shape=... and embed=..., as docs/own_vit.md shows"
            )
        cls._shape(vit)

    @classmethod
    def _shape(cls, vit: nn.Module) -> tuple[int, ...]:
        shape = cls._patch_shape(vit)
        if not isinstance(shape, (tuple, list)) or len(shape) != 3:
            raise ValueError(f"patch_shape must return (channels, height, width), got {shape!r}")
        return tuple(check_positive_int(n, "every number of patch_shape") for n in shape)

    @classmethod
    def patch_size(cls, vit: nn.Module) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        return cls._shape(vit)[1:]

    @classmethod
    def channels(cls, vit: nn.Module) -> int:
        """Channels of a pixel."""
        return cls._shape(vit)[0]

    def checkpoints(self, index: int) -> bool:
        """Only where the model says so as those of timm do."""
        return getattr(self.vit, "grad_checkpointing", False)

    def read(self, index: int) -> BlockSpec:
        """Read a block as it is registered."""
        return self._read_block(self.vit, self.blocks[index])

    def embed(
        self, pixels: torch.Tensor, positions: str = "resample"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As it is registered; see the base class."""
        if positions == "nearest":
            self.require_learned()
        if self.is_traced("patches"):
            rows, seed = [self.grids.num_views, self.grids.num_tokens], self.seed(self.vit.training)
            return tuple(self.traced("patches", rows, inputs=[pixels], of_one=[1], seed=seed))
        return self.patches(pixels)

    def patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix tokens ``(S, P, C)`` and tokens ``(N, C)``."""
        prefix, tokens = self._embed(self.vit, pixels, self.grids)
        self._check_tokens(tokens, "tokens", (len(pixels),))
        views = self.grids.num_views
        if prefix is None:
            prefix = tokens.new_empty((views, 0, tokens.shape[-1]))
        self._check_tokens(prefix, "prefix", (views, self._prefix_tokens))
        return prefix, tokens

    def _check_tokens(self, x: Any, name: str, rows: tuple[int, ...]) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"embed must return a tensor as {name}, got {type(x).__name__}")
        if x.dim() != len(rows) + 1 or tuple(x.shape[:-1]) != rows:
            expected = ", ".join(map(str, (*rows, "C")))
            raise ValueError(
                f"embed must return {name} of shape ({expected}) for these grids and prefix_tokens "
                f"= {self._prefix_tokens}, got shape {tuple(x.shape)}"
            )

    def part_tensors(self, part: str, call: Sequence[int]) -> list[torch.Tensor]:
        """All parameters outside the blocks may be those that the tokens are made of."""
        if part != "patches":
            return super().part_tensors(part, call)
        named = self.vit.named_parameters()
        return [x for name, x in named if not name.startswith(f"{self.blocks_name}.")]

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As it is registered; see the base class."""
        return (
            (prefix, patches) if self._finish is None else self._finish(self.vit, prefix, patches)
        )


def _check_model(
    cls: type, blocks: str, methods: tuple[str, ...], vit: nn.Module, config: CompressorConfig
) -> None:
    """Refuse a model that is not what was registered."""
    require_methods(vit, cls, methods)
    found = blocks_at(vit, blocks)
    for index in config.layers:
        require_own_forward(found[index], f"vit.{blocks}.{index}")


def _check_functions(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")


def _check(cls: Any, blocks: Any, layout: Any, methods: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of modules, got {cls!r}")
    if is_mixed(cls) or is_built_in(cls):
        raise ValueError(f"cls must not be of a family that is known, got {cls.__name__}")
    if not isinstance(blocks, str):
        raise TypeError(f"blocks must be a dotted name, got {type(blocks).__name__}")
    if layout not in ("NLC", "LNC"):
        raise ValueError(f'layout must be "NLC" or "LNC", got {layout!r}')
    if isinstance(methods, str):
        raise TypeError(f"methods must be a sequence of names, got {methods!r}")
    for name in methods:
        if not callable(getattr(cls, name, None)):
            raise ValueError(f"methods must name methods of {cls.__name__}, got {name!r}")
