# SPDX-License-Identifier: Apache-2.0
"""Views of different sizes in one packed sequence, each as its model would see it alone.

:class:`uhd_ops.nn.SliceEncoder` runs the blocks on the packed sequence. What is different in each
family, the patch embedding, the positions, attention that is not a softmax over scores of queries
and keys, and what follows the blocks, is in a subclass of :class:`PackedModel` in the family's
file. Whatever depends on the size of a view is made by the model's own functions, once for each
size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import BlockSpec, read_block
from uhd_ops.nn.early_compressor import OwnWindowAttention
from uhd_ops.nn.modules import PartView
from uhd_ops.nn.positions import Frequencies, Rotary, merge_table
from uhd_ops.nn.traced_parts import run_in_graph
from uhd_ops.nn.view_ratios import Merge, ViewRatios
from uhd_ops.ops.view_attention import by_group
from uhd_ops.windows import Windows

Grid = tuple[int, int]
# Side of the windows that became one token, in patches: of all views, or of each where they differ.
Sides = int | tuple[int, ...] | ViewRatios
Tables = tuple[torch.Tensor, torch.Tensor]  # sine and cosine, each (..., N, D)


class PackedModel:
    """A model on packed views, for one forward pass.

    A subclass says what is different in its family. Its methods read the parameters as they are, so
    gradients reach them.

    Args:
        vit: The transformer, with or without a compressor.
        grids: Patch grids of the views.
        number: That of the encoder in a compiled graph; see ``uhd_ops.nn.traced_parts``.

    Attributes:
        position_names: Where the model has parameters and modules that its positions are made of.
        score_names: Where the model, and where a block has those that blocks add to their scores.
        stem_names: Where it has what embeds whole views, as :meth:`embeds_views` says.
        tail_names: Where it has what :meth:`finish` runs on whole views; none where it does not.
        blocks_name: Name of the list of blocks.
        methods: What a subclass of the family's class must leave as it is.
        per_block: Whether every block has rotary embeddings of its own.
    """

    blocks_name = "blocks"
    position_names: tuple[str, ...] = ("pos_embed", "rope")
    score_names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    stem_names: tuple[str, ...] = ()
    tail_names: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    per_block = False

    def __init__(self, vit: nn.Module, grids: PackedGrids, number: int | None = None) -> None:
        self.vit, self.grids, self.number = vit, grids, number
        self._made: dict[Hashable, Any] = {}

    # ---- what the model is --------------------------------------------------------------------

    @classmethod
    def check(cls, vit: nn.Module) -> None:
        """Refuse a model whose embedding is not understood."""

    @classmethod
    def patch_size(cls, vit: nn.Module) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        raise NotImplementedError

    @classmethod
    def channels(cls, vit: nn.Module) -> int:
        """Channels of a pixel."""
        raise NotImplementedError

    @classmethod
    def like(cls, vit: nn.Module) -> torch.Tensor:
        """A parameter whose dtype and device the pixels have."""
        return next(vit.parameters())

    @classmethod
    def pads(cls, vit: nn.Module) -> bool:
        """Whether the model itself pads images to whole patches, with zeros."""
        return False

    @classmethod
    def refuse_dropout(cls, vit: nn.Module) -> None:
        """Refuse patch dropout in training."""
        if vit.training and getattr(getattr(vit, "patch_drop", None), "prob", 0.0):
            raise NotImplementedError(
                "patch dropout leaves no grid: set vit.patch_drop.prob = 0, or call vit.eval()"
            )

    def checkpoints(self, index: int) -> bool:
        """Whether the model runs a block again in the backward pass."""
        return self.vit.grad_checkpointing

    # ---- what enters the first block ----------------------------------------------------------

    def embed(
        self, pixels: torch.Tensor, positions: str = "resample"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed packed patches ``(N, 3, p, q)`` in raster order.

        Args:
            pixels: The patches of all views.
            positions: How a learned table of positions is fitted to the grid of a view:
                ``"resample"`` as the model does, ``"nearest"`` takes for row i of n that of row
                ``floor(i * S / n)`` of S.

        Returns:
            Prefix tokens ``(S, P, C)`` and patch tokens ``(N, C)``.
        """
        if self.embeds_views() and self.is_traced("patches"):
            call = {"inputs": [pixels], "of_one": [1], "seed": self.seed(self.vit.training)}
            (x,) = self.traced("patches", [self.grids.num_tokens], **call)
        else:
            x = self.patches(pixels)
        if positions == "nearest":
            table = self.require_learned()
            nearest = Windows.of(self.grids, 1, x.device).nearest(*table.shape[:2])
            x = x + table.flatten(0, 1)[nearest]
        else:
            for table in self.once(self._absolute):
                x = x + table
        prefix = self.prefix()
        if prefix is None:
            return x.new_empty((self.grids.num_views, 0, x.shape[-1])), self.enter(x)
        return self.enter(prefix.expand(self.grids.num_views, -1, -1)), self.enter(x)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding without positions: ``(N, 3, p, q)`` to ``(N, C)``."""
        raise NotImplementedError

    def embeds_views(self) -> bool:
        """Whether :meth:`patches` needs whole views."""
        return False

    def convolve(self, conv: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """A convolution whose stride is its kernel, on packed patches: ``(N, C)``."""
        if type(conv) is nn.Conv2d:
            return functional.linear(pixels.flatten(1), conv.weight.flatten(1), conv.bias)
        return conv(pixels).flatten(1)

    def view_by_view(self, stem: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Run a module on the images of the views, those of one size as a batch: ``(N, C)``.

        Args:
            stem: Takes ``(n, 3, H, W)``; returns ``(n, C, h, w)``.
            pixels: Packed patches.
        """

        def run(views: torch.Tensor, grid: Grid) -> torch.Tensor:
            return stem(unpatchify(views, grid)).flatten(2).transpose(1, 2)

        return self.by_grid(run, pixels)

    def prefix(self) -> torch.Tensor | None:
        """Tokens in front of the patches, ``(1, P, C)``, with their positions; None for none."""
        return None

    def absolute(self, grid: Grid) -> torch.Tensor | None:
        """What the model adds to the patches of a view alone, ``(h * w, C)``; None for nothing."""
        return None

    def learned(self) -> torch.Tensor | None:
        """The learned position embeddings, ``(h, w, C)``, or None where there are none."""
        return None

    def require_learned(self) -> torch.Tensor:
        """As :meth:`learned`; refuses a model without."""
        table = self.learned()
        if table is None:
            raise ValueError(
                'positions must be "resample" for a model without one learned position embedding '
                f'for each patch, such as {type(self.vit).__name__}, got "nearest"'
            )
        return table

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What comes between the positions and the first block."""
        return x

    # ---- positions in the blocks --------------------------------------------------------------

    def rope(self, grid: Grid) -> Tables | None:
        """Sine and cosine for the patches of a view alone, as the model hands them to its blocks.

        Each ``(N, D)`` or ``(H, N, D)``; with a list of blocks in front if ``per_block``.
        """
        return None

    def draws_positions(self) -> bool:
        """Whether every call of ``rope`` gives other random ones."""
        return False

    def frequencies(self) -> Frequencies | None:
        """Those of the rotary embeddings, where neighbours may differ by pi or more."""
        return None

    def rotary(
        self, index: int, sides: Sides, prefix: int, views: tuple[int, ...] | None = None
    ) -> Rotary | None:
        """Return the rotary embeddings of views for one block.

        Args:
            index: Index of the block.
            sides: For each view, the side of the windows that became one token, in patches.
            prefix: Tokens in front of each view; they are not turned.
            views: Indices of the views; None for all.

        Returns:
            Sine and cosine, ``(T, 1 or H, D)``; None where the model has none.
        """
        # Where blocks have their own, a graph gets those of all from one call.
        index = index if self.per_block else 0
        if views is None and self.is_traced("rotary"):
            tables = self.once(self._traced_rotary, sides, prefix)[2 * index : 2 * index + 2]
        else:
            tables = self.once(self._rotary, index, sides, prefix, views)
        return Rotary(*tables) if tables else None

    def _traced_rotary(self, sides: Sides, prefix: int) -> list[torch.Tensor]:
        grids = self.merged_grids(sides)
        tokens = grids.num_tokens + prefix * grids.num_views
        # One for all calls, so that blocks in front of a merge and behind it have the same ones.
        seed = self.once(self.seed, self.draws_positions())
        return self.traced("rotary", [tokens], sides=sides, call=[prefix], seed=seed)

    def _rotary(
        self, index: int, sides: Sides, prefix: int, views: tuple[int, ...] | None = None
    ) -> list[torch.Tensor]:
        tables, done, parts = self.once(self._rope_of_views), {}, []
        if any(table is None for table in tables):
            return []
        sides = self.each(sides)
        for view in range(len(sides)) if views is None else views:
            table, side = tables[view], sides[view]
            key = id(table), side
            if key not in done:
                own = tuple(part[index] for part in table) if self.per_block else table
                done[key] = with_prefix(self._merged(own, self.grids[view], side), prefix)
            parts.append(done[key])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _rope_of_views(self) -> list[Tables | None]:
        """The tables of each view in front of any merge; the same object for the same one."""
        if self.draws_positions():
            return [self.rope(grid) for grid in self.grids]
        tables = {grid: self.rope(grid) for grid in dict.fromkeys(self.grids)}
        return [tables[grid] for grid in self.grids]

    def _merged(self, tables: Tables, grid: Grid, side: int) -> Tables:
        if side == 1:
            return tables
        return merge_table(*tables, grid, side, self.merged_positions, self.frequencies())

    def _absolute(self) -> list[torch.Tensor]:
        """What is added to all patches; nothing for no positions."""
        if self.is_traced("absolute"):
            return self.traced("absolute", [self.grids.num_tokens])
        tables = {grid: self.absolute(grid) for grid in dict.fromkeys(self.grids)}
        if any(table is None for table in tables.values()):
            return []
        return [torch.cat([tables[grid] for grid in self.grids])]

    # ---- parts that an operator runs in a graph ------------------------------------------------

    def is_traced(self, part: str, *call: int) -> bool:
        """Whether a graph is being made in which an operator runs a part.

        Not where the part reads what is computed from parameters: they would get no gradient.
        """
        if not torch.compiler.is_compiling() or self.number is None:
            return False
        tensors = self.part_tensors(part, call)
        return all(isinstance(x, nn.Parameter) or not x.requires_grad for x in tensors)

    def traced(
        self, part: str, rows: Sequence[int], *, sides: Sides = 1, **options: Any
    ) -> list[torch.Tensor]:
        """Leave a part to the operator; see ``uhd_ops.nn.traced_parts.run_in_graph``."""
        if isinstance(sides, ViewRatios):
            sides = sides.rows[:, 1]
        else:
            sides = torch.tensor([sides], device="cpu")
        return run_in_graph(self, part, rows, sides=sides, **options)

    def seed(self, draws: bool) -> torch.Tensor | None:
        """Draw what the random numbers of a part begin with; None where there are none."""
        return torch.randint(2**62, (), device="cpu") if draws else None

    def run_part(
        self,
        part: str,
        inputs: list[torch.Tensor],
        sides: list[int],
        call: Sequence[int],
        numbers: Sequence[float],
    ) -> list[torch.Tensor]:
        """Run a part where a graph runs.

        Args:
            part: ``"absolute"`` for what is added to the patches; ``"rotary"`` for sine and cosine,
                one after the other, of each block where every block has its own; ``"attend"`` and
                ``"module"`` for the attention of a block, ``"merge"`` for its compressor;
                ``"patches"`` and ``"finish"`` for the methods of that name.
            inputs: What it works on; for ``"merge"`` maybe how often each view is merged, too.
            sides: One for all views, or one for each and a last one that does not matter.
            call: For ``"merge"`` the index of the block; for ``"rotary"`` the number of prefix
                tokens; for attention that, the index of the block, and that of the branch.
            numbers: Scale and dropout of ``"attend"``.
        """
        sides = sides[0] if len(sides) == 1 else tuple(sides[:-1])
        if part == "absolute":
            return self._absolute()
        if part == "rotary":
            blocks = range(len(self.blocks)) if self.per_block else (0,)
            return [table for index in blocks for table in self._rotary(index, sides, *call)]
        if part == "patches":
            made = self.patches(*inputs)
            return [made] if isinstance(made, torch.Tensor) else list(made)
        if part == "finish":
            return list(self.finish(*inputs, sides))
        if part == "merge":
            patches, *each = inputs
            if each:
                window = self.blocks[call[0]].compressor.window
                ratios = [window ** (2 * count) for count in each[0][:-1].tolist()]
                each = [ViewRatios(ratios, self.grids, window)]
            return [Merge(self, *call, sides, *each or (None,))(patches)[0]]
        prefix, index, branch = call
        scope = self.views_scope(index, sides, prefix)
        if part == "module":
            return [scope.run_module(self.spec(index).attentions[branch].module, *inputs)]
        scale, dropout = numbers
        return [scope.attend(*inputs, scale=scale, dropout=dropout)]

    def part_tensors(self, part: str, call: Sequence[int]) -> list[torch.Tensor]:
        """The parameters that a part reads, and the buffers that positions are made of."""
        names = {"patches": self.stem_names, "finish": self.tail_names}
        found = tensors_at(self.vit, names.get(part, self.position_names))
        if part == "merge":
            return [*found, *self.blocks[call[0]].compressor.parameters()]
        if part not in ("attend", "module"):
            return found
        _, index, branch = call
        if part == "module":
            module = self.spec(index).attentions[branch].module
            return module.tensors() if isinstance(module, PartView) else list(module.parameters())
        shared, own = self.score_names
        return tensors_at(self.vit, shared) + tensors_at(self.blocks[index], own)

    # ---- attention, and what follows the blocks -----------------------------

    @property
    def blocks(self) -> nn.Module:
        """The blocks."""
        return self.vit.get_submodule(self.blocks_name)

    def spec(self, index: int) -> BlockSpec:
        """A block by its parts, as they are in this forward pass."""
        return self.once(self.read, index)

    def read(self, index: int) -> BlockSpec:
        """Read a block."""
        return read_block(self.blocks[index])

    def scope(self, index: int, sides: Sides, prefix: int) -> ViewScope:
        """Which tokens of the packed sequence attend to which in a block; see :meth:`rotary`."""
        if torch.compiler.is_compiling():
            return TracedScope(self, index, sides, prefix)
        return self.views_scope(index, sides, prefix)

    def views_scope(self, index: int, sides: Sides, prefix: int) -> ViewScope:
        """As :meth:`scope`, by loops over the views."""
        return ViewScope(self.merged_grids(sides), prefix, self.biases(index, sides))

    def merge(self, index: int, side: int, ratios: ViewRatios | None) -> Merge:
        """What merges tokens after a block.

        Args:
            index: Index of the block, which has a compressor.
            side: Side of the windows that became one token before.
            ratios: Those of the views; None to merge all of them once.
        """
        modules = self.blocks[index].compressor.modules()
        loops = ratios is not None or any(isinstance(m, OwnWindowAttention) for m in modules)
        if loops and self.is_traced("merge", index):
            return TracedMerge(self, index, side, ratios)
        return Merge(self, index, side, ratios)

    def biases(self, index: int, sides: Sides) -> list[Any] | None:
        """What a block adds to the scores of each view, for ViewScope; None for nothing."""
        return None

    @property
    def merged_positions(self) -> str:
        """What positions merged tokens have: ``"center"`` or ``"reindex"``."""
        config = getattr(self.vit, "compression", None)
        return "center" if config is None else config.positions

    def once(self, function: Callable[..., Any], *args: Hashable) -> Any:
        """Call a function once for all blocks."""
        key = (function, *args)
        if key not in self._made:
            self._made[key] = function(*args)
        return self._made[key]

    def end(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`finish`, which an operator runs in a graph if it needs whole views."""
        if not (self.tail_names and self.is_traced("finish")):
            return self.finish(prefix, patches, sides)
        rows = [self.grids.num_views, self.merged_grids(sides).num_tokens]
        call = {"inputs": [prefix, patches], "of_one": [1, 1], "seed": self.seed(self.vit.training)}
        return tuple(self.traced("finish", rows, sides=sides, **call))

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the last block, for ``(S, P, C)`` and ``(N, C)``."""
        return self.vit.norm(prefix), self.vit.norm(patches)

    def each(self, sides: Sides) -> tuple[int, ...]:
        """The side for each view."""
        if isinstance(sides, ViewRatios):
            return sides.sides
        return (sides,) * self.grids.num_views if isinstance(sides, int) else sides

    def merged_grids(self, sides: Sides) -> PackedGrids:
        """Grids of the views after merges."""
        if isinstance(sides, ViewRatios):
            return sides.left(self.grids)
        if isinstance(sides, int):
            return self.grids.merged(sides)
        return PackedGrids(
            [(-(-h // side), -(-w // side)) for (h, w), side in zip(self.grids, sides, strict=True)]
        )

    def by_grid(
        self,
        function: Callable[[torch.Tensor, Grid], torch.Tensor],
        x: torch.Tensor,
        sides: Sides = 1,
    ) -> torch.Tensor:
        """Run a function on packed tokens, the views of one grid as a batch.

        Args:
            function: ``function((n, h * w, ...), (h, w))`` returns ``(n, L, ...)``.
            x: Tokens of the merged grids.
            sides: Those of the merges.
        """
        grids = self.merged_grids(sides)
        lengths = [height * width for height, width in grids]
        return by_group(lambda views, first: function(views[0], grids[first]), (x,), lengths, grids)


class TracedScope(ViewScope):
    """The views in a graph: attention that loops over them is left to the operator.

    Args:
        model: The model.
        index: Index of the block.
        sides: As for :meth:`PackedModel.scope`.
        prefix: Likewise.
    """

    def __init__(self, model: PackedModel, index: int, sides: Sides, prefix: int) -> None:
        super().__init__(model.merged_grids(sides), prefix)
        self.model, self.index, self.sides, self.prefix = model, index, sides, prefix

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As in the base class."""
        if not (any(self.model.score_names) or dropout):
            return super().attend(q, k, v, scale=scale, dropout=dropout)
        if not self._is_left("attend", 0):
            return self._loops().attend(q, k, v, scale=scale, dropout=dropout)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return self._leave("attend", 0, [q, k, v], dropout > 0, numbers=[scale, dropout])

    def run_module(
        self, module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """As in the base class; ``module`` is that of a branch."""
        parts = self.model.spec(self.index).attentions
        modules = [getattr(part, "module", None) for part in parts]
        (branch,) = [place for place, own in enumerate(modules) if own is module]
        if not self._is_left("module", branch):
            return self._loops().run_module(module, x)
        return self._leave("module", branch, [x], module.training)

    def _is_left(self, part: str, branch: int) -> bool:
        return self.model.is_traced(part, self.prefix, self.index, branch)

    def _loops(self) -> ViewScope:
        return self.model.views_scope(self.index, self.sides, self.prefix)

    def _leave(
        self, part: str, branch: int, inputs: list[torch.Tensor], draws: bool, **options: Any
    ) -> torch.Tensor:
        one, seed = [1 + self.prefix] * len(inputs), self.model.seed(draws)
        call = {"inputs": inputs, "of_one": one, "call": [self.prefix, self.index, branch]}
        rows = [inputs[0].shape[0]]
        return self.model.traced(part, rows, sides=self.sides, seed=seed, **call, **options)[0]


class TracedMerge(Merge):
    """The compressor after one block in a graph, where it loops over views: left to the operator.

    Arguments and attributes are those of the base class.
    """

    def __init__(
        self, model: PackedModel, index: int, side: int, ratios: ViewRatios | None
    ) -> None:
        self.model, self.index, self.side, self.ratios = model, index, side, ratios
        self.compressor, self.grids = model.blocks[index].compressor, model.merged_grids(side)
        self.sides = side * self.compressor.window if ratios is None else ratios

    def __call__(self, patches: torch.Tensor) -> tuple[torch.Tensor, PackedGrids]:
        """As in the base class."""
        grids = self.model.merged_grids(self.sides)
        each = [] if self.ratios is None else [self.ratios.rows[:, 0]]
        (merged,) = self.model.traced(
            "merge",
            [grids.num_tokens],
            sides=self.side,
            inputs=[patches, *each],
            of_one=[1, 2][: 1 + len(each)],
            call=[self.index],
            seed=self.model.seed(self.compressor.training),
        )
        return merged, grids


def tensors_at(module: nn.Module, names: Iterable[str]) -> list[torch.Tensor]:
    """The tensors with these dotted names, and parameters and buffers of modules with them."""
    found: list[torch.Tensor] = []
    for name in names:
        part = functools.reduce(lambda p, step: getattr(p, step, None), name.split("."), module)
        if isinstance(part, nn.Module):
            found += [*part.parameters(), *part.buffers()]
        elif part is not None:
            found.append(part)
    return found


def unpatchify(views: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Patches ``(n, h * w, 3, p, q)`` to images ``(n, 3, h * p, w * q)``."""
    return views.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


# ---- rotary embeddings -----------------------------------------------------------------------


def with_prefix(tables: Tables, prefix: int) -> Tables:
    """Tables ``(N, D)`` or ``(H, N, D)`` as ``(P + N, 1 or H, D)``; prefix tokens do not turn."""
    sin, cos = (t.unsqueeze(-2) if t.dim() == 2 else t.transpose(-3, -2) for t in tables)
    if prefix:
        still = (prefix, *sin.shape[1:])
        sin, cos = torch.cat([sin.new_zeros(still), sin]), torch.cat([cos.new_ones(still), cos])
    return sin, cos
