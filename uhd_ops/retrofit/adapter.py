# SPDX-License-Identifier: Apache-2.0
"""What the classes of a model with a compressor and of its blocks become: mixins in front of them.

A block sees tokens only, and their number does not tell the grid: 16 tokens are 4 x 4 or 2 x 8. The
model, which sees the image, leaves the layout in a context variable for the time of its forward
pass; each thread has its own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import Mixed, is_mixed
from uhd_ops.nn.positions import Frequencies, Rotary, merge_table
from uhd_ops.retrofit.packed import PackedModel
from uhd_ops.retrofit.padded_layout import PaddedLayout, eager_if_padded, refuse_maps

# ---- how a sequence is made up, and the pass that runs a block ---------------------------------


class TokenLayout(NamedTuple):
    """A sequence ``(B, P + h*w, C)``: ``prefix`` tokens, then the patches of one grid.

    ``layout[:2]`` is the grid: torch.compile of torch 2.10 traces no property of a NamedTuple.

    Attributes:
        height: Rows h of the grid.
        width: Columns w of the grid.
        prefix: Tokens P in front of the patches.
        frequencies: Those of the rotary embeddings, where neighbours may differ by pi or more.
    """

    height: int
    width: int
    prefix: int
    frequencies: Frequencies | None = None

    def merged(self, window: int) -> TokenLayout:
        """The layout after the compressor."""
        height, width = -(-self.height // window), -(-self.width // window)
        return self._replace(height=height, width=width)

    @property
    def places(self) -> tuple[int, ...]:
        """What tells it from other layouts of the same model."""
        return self[:3]

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` has as many tokens."""
        return x.shape[1] == self.prefix + self.height * self.width

    def check(self, x: torch.Tensor) -> None:
        """Refuse tokens of another number: something added or dropped some."""
        height, width, prefix, _ = self
        if not self.holds(x):
            raise ValueError(
                f"x must hold {prefix} prefix tokens and {height} x {width} patches, "
                f"{prefix + height * width} tokens, got shape {tuple(x.shape)}"
            )

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the patches; prefix tokens pass unchanged."""
        merged = compressor(x[:, self.prefix :], self[:2], positions)
        return torch.cat([x[:, : self.prefix], merged], dim=1) if self.prefix else merged

    def merge_table(
        self, sin: torch.Tensor, cos: torch.Tensor, window: int, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each merged token its sine and cosine; see ``nn.positions.merge_table``."""
        return merge_table(sin, cos, self[:2], window, positions, self.frequencies)


class RunningForward:
    """One forward pass of a model with a compressor.

    Once the pass is over, nothing but the graph that it built keeps this object: the nodes that
    made the tokens of the changed blocks, and what went into and came out of the model, hold it.

    Attributes:
        layout: How its tokens are laid out.
        blocks: The changed blocks that it ran.
        tables: What blocks derived from a tensor that several of them are given, by its id and the
            side of the windows.
    """

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.blocks: set[nn.Module] = set()
        self.tables: dict[tuple[int, int], tuple[torch.Tensor, Any]] = {}

    def derived(
        self, source: torch.Tensor, window: int, derive: Callable[[torch.Tensor], Any]
    ) -> Any:
        """Return ``derive(source)``, once for all blocks where no gradient flows through it."""
        if source.requires_grad:
            return derive(source)
        key = id(source), window
        if key not in self.tables:
            self.tables[key] = source, derive(source)  # keeps the id from being reused
        return self.tables[key][1]

    def join_graph_of(self, value: Any) -> None:
        """Live as long as the graph behind the tensors in ``value``, and be found from there."""
        values = [value]
        while values:
            value = values.pop()
            if isinstance(value, Mapping):
                values.extend(value.values())
            elif isinstance(value, (list, tuple)):
                values.extend(value)
            elif isinstance(value, torch.Tensor) and value.grad_fn is not None:
                passes = value.grad_fn.metadata.setdefault(_PASSES, [])
                if self not in passes:
                    passes.append(self)
                    with _LOCK:
                        _LIVE.add(self)


RUNNING: ContextVar[RunningForward | None] = ContextVar("the running forward pass", default=None)
_PASSES = "uhd_ops.passes"  # a key in the metadata of a node
_LIVE: WeakSet[RunningForward] = WeakSet()
_LOCK = threading.Lock()


def run_with(layout: Any, method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``method`` while blocks can find ``layout``; not for tracing."""
    running = RunningForward(layout)
    token = RUNNING.set(running)
    try:
        running.join_graph_of(arguments)
        output = method(**arguments)
        running.join_graph_of(output)
        return output
    finally:
        RUNNING.reset(token)


def running_forward(block: nn.Module, x: torch.Tensor) -> RunningForward | None:
    """Find the forward pass in which ``block`` runs on the tokens ``x``, or ran if it runs again.

    Gradient checkpointing runs a block again during the backward pass, when no model is running and
    other images may have gone through. The tokens need not be the tensor that they were, nor share
    its memory: FSDP, hooks and offloading make new ones. But autograd says for which node of the
    graph it wants them, and behind that node are those which the pass has joined. Where no gradient
    flows that far, or a reentrant checkpoint around several blocks left no such node, the passes of
    this block that still have a graph decide, as long as those with this number of tokens agree.

    Returns:
        None where there is no such pass: somebody runs the block without its model.

    Raises:
        RuntimeError: Several passes may be the one, and their grids differ.
    """
    running = RUNNING.get()
    if running is not None:
        running.blocks.add(block)
        running.join_graph_of(x)
        return running
    node = torch._C._current_autograd_node()
    if node is None:
        return None
    with _LOCK:
        live = [one for one in _LIVE if block in one.blocks]
    joined = [one for one in _passes_behind(node) if one in live]
    found = joined or [one for one in live if one.layout.merged(block.window).holds(x)]
    if len({one.layout.places for one in found}) > 1:
        grids = " and ".join(sorted(str(one.layout.places) for one in found))
        raise RuntimeError(
            "the patch grid of these tokens is not known: a block runs again in a backward pass, "
            f"and forward passes with as many tokens have different grids, {grids}; checkpoint "
            "blocks one by one, or with use_reentrant=False"
        )
    return found[0] if found else None


def _passes_behind(node: Any) -> list[RunningForward]:
    """The passes that joined the graph at the first joined node behind ``node``."""
    front, seen = [node], {node}
    while front:
        for one in front:
            if _PASSES in one.metadata:
                return one.metadata[_PASSES]
        behind = [n for one in front for n, _ in one.next_functions if n is not None]
        front = [n for n in dict.fromkeys(behind) if n not in seen]
        seen.update(front)
    return []


# Models with a compressor: a block does not know its own.
_MODELS: WeakSet[nn.Module] = WeakSet()


def layout_of_every_image(block: nn.Module) -> Any:
    """The layout that the model of ``block`` has for all images; None if their sizes may differ."""
    with _LOCK:
        models = list(_MODELS)
    owner = next((model for model in models if block in model._changed_blocks()), None)
    return None if owner is None else owner._layout_of_every_image()


# ---- blocks ------------------------------------------------------------------------------------


class LayoutAware(Mixed):
    """A block that knows the layout of the tokens in the running forward pass.

    Attributes:
        window: Side of the windows, in fine tokens, that became one token in front of the block.
        layout_while_tracing: Stands in for the context variable under torch.compile, which cannot
            trace one; None otherwise.
    """

    window: int = 1
    layout_while_tracing: TokenLayout | None = None

    def _layout_of(self, x: torch.Tensor) -> TokenLayout:
        """The layout in front of all compressors."""
        if self.layout_while_tracing is not None:
            return self.layout_while_tracing
        running = layout = None
        if not torch.compiler.is_compiling():
            running = running_forward(self, x)
            layout = layout_of_every_image(self) if running is None else running.layout
        if layout is None:
            raise RuntimeError(
                "the patch grid of these tokens is not known: a block with a compressor, or behind "
                "it, runs in the forward pass of its model, or by itself where the model takes "
                "images of one size only"
            )
        return layout


class CompressedBlock(LayoutAware):
    """A block whose patch tokens are merged after its own body.

    Attributes:
        compressor: The module that merges them.
        masks: What the block is given behind the tokens, where that are masks, which are refused.
    """

    prefix = "Compressed"
    compressor: nn.Module
    masks: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        if self.masks:
            refuse_masks(dict(zip(self.masks, args, strict=False)) | kwargs)
        layout = self._layout_of(x)
        if self.window > 1:
            layout = layout.merged(self.window)
        layout.check(x)
        positions = self._positions(layout, *args, **kwargs)
        return layout.merge(super().forward(x, *args, **kwargs), self.compressor, positions)

    def _positions(self, layout: TokenLayout, *args: Any, **kwargs: Any) -> Rotary | None:
        """Rotary embeddings of the patches, from what the block is given beside the tokens."""
        return None


class CoarsePart(Mixed):
    """A module after the compressor that needs its positions on the merged grid.

    Attributes:
        window: Side of a window, in tokens.
        positions: How merged tokens get their positions; see ``insert_early_compressor``.
    """

    prefix = "Coarse"
    window: int
    positions: str


class CoarseBlock(LayoutAware, CoarsePart):
    """A whole block of that kind; it knows the layout of the tokens in front of the compressor."""

    def _derived(
        self, x: torch.Tensor, source: torch.Tensor, derive: Callable[[torch.Tensor], Any]
    ) -> Any:
        """Return ``derive(source)``, computed once in a forward pass where that is possible."""
        running = None
        if self.layout_while_tracing is None:
            running = running_forward(self, x)
        return derive(source) if running is None else running.derived(source, self.window, derive)


# ---- models ------------------------------------------------------------------------------------


class Compressed(Mixed):
    """A model that knows what was inserted.

    Attributes:
        compression: The options of the insertion.
        adapted: Methods of the model's class that are called differently, and what calls each:
            ``caller(self, layout, method, arguments)``. The arguments are by name, with the
            defaults of the class, whose signature stays: what a later version of a library adds
            passes through.
        takes_padded: Whether the model takes padded batches of patches as well as images.
    """

    prefix = "Compressed"
    compression: CompressorConfig
    adapted: ClassVar[Mapping[str, str]] = {}
    takes_padded: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_mixed(cls):
            for name, caller in cls.adapted.items():
                if hasattr(cls.body_class, name):
                    method = getattr(cls.body_class, name)
                    setattr(cls, name, cls._adapt(method, getattr(cls, caller)))
            if hasattr(cls.body_class, "init_weights"):
                cls.init_weights = _reusing(cls.body_class.init_weights)

    @classmethod
    def _adapt(cls, method: Callable[..., Any], caller: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``method`` as ``caller`` calls it."""
        _, *parameters = inspect.signature(method).parameters.values()
        signature = inspect.Signature(parameters)
        others = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(method)
        def adapted(self: Compressed, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            for name in others:
                arguments.update(arguments.pop(name))
            refuse_symbols(arguments)
            refuse_masks(arguments)
            layout = self._layout(**arguments)
            return caller(self, layout, functools.partial(method, self), arguments)

        return eager_if_padded(adapted) if cls.takes_padded else adapted

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse what ``torch.jit.script`` would fail on, with an error about its annotations."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose methods are bound when "
            "the compressor is inserted: use torch.export, or torch.compile"
        )

    def _layout(self, **arguments: Any) -> Any:
        """Return the layout of the tokens in front of the compressor, by a call's arguments."""
        raise NotImplementedError

    def _remember(self, config: CompressorConfig) -> None:
        """Note what was inserted."""
        self.compression = config

    def _forget(self) -> None:
        """Undo :meth:`_remember`."""
        del self.compression


def _reusing(init_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that initialises the model's own weights, and the compressors from them."""

    @functools.wraps(init_weights)
    def both(self: Compressed, *args: Any, **kwargs: Any) -> Any:
        from uhd_ops.retrofit.weights import reuse_again  # which stands on this file

        result = init_weights(self, *args, **kwargs)
        reuse_again(self)
        return result

    return both


class CompressedModel(Compressed):
    """What all models with a compressor share."""

    blocks_name = "blocks"
    adapted: ClassVar[Mapping[str, str]] = {
        "forward_features": "_run",
        "forward_intermediates": "_intermediates",
    }

    def _layout(self, x: torch.Tensor, **options: Any) -> Any:
        """The layout of images, as a model of timm cuts them."""
        return image_layout(self, x, self.num_prefix_tokens)

    def _run(self, layout: Any, method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Call ``method`` while the blocks know the layout of the tokens."""
        if not torch.compiler.is_compiling():
            return run_with(layout, method, arguments)
        blocks = self._changed_blocks()
        for block in blocks:
            block.layout_while_tracing = layout
        try:
            return method(**arguments)
        finally:
            for block in blocks:
                block.layout_while_tracing = None

    def _intermediates(
        self, layout: Any, method: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """Call timm's ``forward_intermediates``; each map gets the grid that it has.

        The original would give every intermediate the fine grid: a quarter of the channels each,
        without an error.
        """
        if arguments["output_fmt"] != "NCHW":
            return self._run(layout, method, arguments)
        result = self._run(layout, method, arguments | {"output_fmt": "NLC"})
        to_map = functools.partial(self._to_map, layout)
        if isinstance(result, dict):
            result["image_intermediates"] = [to_map(y) for y in result["image_intermediates"]]
            return result
        if isinstance(result, list):  # intermediates_only
            return [to_map(y) for y in result]
        return result[0], [to_map(y) for y in result[1]]

    def _remember(self, config: CompressorConfig) -> None:
        super()._remember(config)
        with _LOCK:
            _MODELS.add(self)

    def _forget(self) -> None:
        super()._forget()
        with _LOCK:
            _MODELS.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Finish a copy, or what was loaded from a pickle."""
        super().__setstate__(state)
        with _LOCK:
            _MODELS.add(self)

    def _layout_of_every_image(self) -> Any:
        """The layout, if the model takes images of one size only; None if it takes others too."""
        embed = getattr(self, "patch_embed", None)
        if not getattr(embed, "strict_img_size", False) or embed.img_size is None:
            return None
        return self._layout(x=torch.empty(1, 3, *embed.img_size, device="meta"))

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

    def _to_map(self, layout: TokenLayout, y: Any) -> Any:
        """``(B, L, C)`` to ``(B, C, h, w)`` on the fine or the merged grid, whichever has L."""
        if isinstance(y, tuple):  # with prefix tokens
            return self._to_map(layout, y[0]), *y[1:]
        return self._to_grid(layout, y).permute(0, 3, 1, 2).contiguous()

    def _to_grid(self, layout: TokenLayout, y: torch.Tensor) -> torch.Tensor:
        """``(B, L, C)`` to ``(B, h, w, C)``; likewise."""
        grids = [layout.merged(window)[:2] for window in self._windows()]
        fitting = (grid for grid in grids if grid[0] * grid[1] == y.shape[1])
        return y.unflatten(1, next(fitting, grids[-1]))

    def extra_repr(self) -> str:
        """Show what was inserted."""
        return f"compression={self.compression}"


class CompressedPaddedModel(CompressedModel):
    """A model that takes padded batches of patches as well as images."""

    takes_padded = True

    def _intermediates(
        self, layout: Any, method: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """Likewise; a dictionary returned for a padded batch has ``merged_patch_valid``.

        That is the validity of the tokens from the compressed block on, and of ``image_features``;
        ``patch_valid`` is that in front of it.
        """
        refuse_maps(layout, arguments["output_fmt"])
        result = super()._intermediates(layout, method, arguments)
        if isinstance(result, dict) and isinstance(layout, PaddedLayout):
            result["merged_patch_valid"] = self._behind(layout).valid
        return result


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
        coarse: Mixin for the blocks after it, or None where they can stay as they are.
        check: Refuses a model that is not understood, before anything is changed.
        parts: Mixins for submodules of the blocks behind, by name; a block may lack any of them.
        read: ``read(vit, block)`` reads block ``layer``, where a block does not tell everything.
        transformer: Finds the transformer in the model that the user has, which may wrap it.
        wrapper: Mixin for a model that does.
        heads: Mixins for submodules of the transformer, by name; it may lack any of them.
        packed: How a model runs on views of different sizes in one packed sequence.
    """

    model: type[CompressedModel]
    compressed: type[CompressedBlock]
    coarse: type[CoarseBlock] | None
    check: Callable[[nn.Module, CompressorConfig], None]
    parts: Mapping[str, type[CoarsePart]] = field(default_factory=dict)
    read: Callable[[nn.Module, nn.Module], BlockSpec] | None = None
    transformer: Callable[[nn.Module], nn.Module] = lambda vit: vit
    wrapper: type[CompressedWrapper] = CompressedWrapper
    heads: Mapping[str, type[CoarseBlock]] = field(default_factory=dict)
    packed: type[PackedModel] = PackedModel


def require_methods(vit: nn.Module, cls: type, methods: tuple[str, ...]) -> None:
    """Refuse a model whose class or instance replaces a method that the compressor relies on."""
    for method in methods:
        if method in vars(vit) or getattr(type(vit), method) is not getattr(cls, method):
            raise NotImplementedError(
                f"vit must leave {cls.__name__}.{method} as it is, but {type(vit).__name__} "
                "replaces it"
            )


def refuse_symbols(arguments: Mapping[str, Any]) -> None:
    """Refuse the proxies of ``torch.fx.symbolic_trace``, which have no sizes."""
    for name, value in arguments.items():
        if isinstance(value, torch.fx.Proxy):
            raise NotImplementedError(
                f"{name} must not be a torch.fx.Proxy in a model with a compressor, whose windows "
                "depend on the patch grid: use torch.export, which traces with sizes"
            )


def refuse_masks(arguments: Mapping[str, Any]) -> None:
    """Refuse masks among the arguments of a call: they are made for the fine sequence."""
    for name in ("attn_mask", "attention_mask", "is_causal"):
        value = arguments.get(name)
        if value is not None and value is not False:
            allowed = False if name == "is_causal" else None
            raise NotImplementedError(
                f"{name} must be {allowed} in a model with a compressor, which changes the number "
                "of tokens"
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
