# SPDX-License-Identifier: Apache-2.0
"""Views of different sizes in one packed sequence, each as its model would see it alone.

:class:`uhd_ops.nn.SliceEncoder` runs the blocks on the packed sequence. What is different in each
family, the patch embedding, the positions, attention that is no softmax over scores of queries and
keys, and what follows the blocks, is in a subclass of :class:`PackedModel` in the family's file.
Whatever depends on the size of a view is made by the model's own functions, once for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import BlockSpec, read_block
from uhd_ops.nn.positions import Frequencies, Rotary, merge_table
from uhd_ops.ops.view_attention import by_group
from uhd_ops.windows import Windows

Grid = tuple[int, int]
# Side of the windows that became one token, in patches: of all views, or of each where they differ.
Sides = int | tuple[int, ...]
Tables = tuple[torch.Tensor, torch.Tensor]  # sine and cosine, each (..., N, D)


class PackedModel:
    """A model on packed views, for one forward pass.

    A subclass says what is different in its family. Its methods read the parameters as they are, so
    gradients reach them.

    Args:
        vit: The transformer, with or without a compressor.
        grids: Patch grids of the views.
        number: That of the encoder in a compiled graph; see ``uhd_ops.retrofit.traced_tables``.

    Attributes:
        position_names: Where the model has parameters and modules that its positions are made of.
        blocks_name: Name of the list of blocks.
        methods: What a subclass of the family's class must leave as it is.
        per_block: Whether every block has rotary embeddings of its own.
    """

    blocks_name = "blocks"
    position_names: tuple[str, ...] = ("pos_embed", "rope")
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
        x = self.patches(pixels)
        if positions == "nearest":
            table = self.require_learned()
            nearest = Windows.of(self.grids, 1, x.device).nearest(*table.shape[:2])
            x = x + table.flatten(0, 1)[nearest]
        else:
            for table in self.tables(self.grids.num_tokens, "absolute"):
                x = x + table
        prefix = self.prefix()
        if prefix is None:
            return x.new_empty((self.grids.num_views, 0, x.shape[-1])), self.enter(x)
        return self.enter(prefix.expand(self.grids.num_views, -1, -1)), self.enter(x)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch embedding without positions: ``(N, 3, p, q)`` to ``(N, C)``."""
        raise NotImplementedError

    def convolve(self, conv: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """A convolution whose stride is its kernel, on packed patches: ``(N, C)``."""
        if type(conv) is nn.Conv2d:
            return functional.linear(pixels.flatten(1), conv.weight.flatten(1), conv.bias)
        return self.view_by_view(conv, pixels)

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
        if self.is_traced():
            tables = self.once(self._traced_rotary, sides, prefix, views)
            tables = tables[2 * index : 2 * index + 2]
        else:
            tables = self.once(self._rotary, index, sides, prefix, views)
        return Rotary(*tables) if tables else None

    def _traced_rotary(
        self, sides: Sides, prefix: int, views: tuple[int, ...] | None
    ) -> list[torch.Tensor]:
        grids = self.merged_grids(sides)
        if views is not None:
            grids = PackedGrids([grids[view] for view in views])
        tokens = grids.num_tokens + prefix * grids.num_views
        sides = [sides] if isinstance(sides, int) else list(sides)
        return self.tables(tokens, "rotary", prefix, sides, list(views or ()))

    def _rotary(
        self, index: int, sides: Sides, prefix: int, views: tuple[int, ...] | None
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

    # ---- tables of all views --------------------------------------------------------------------

    def position_tensors(self) -> list[torch.Tensor]:
        """The parameters and buffers that positions are made of."""
        found: list[torch.Tensor] = []
        for name in self.position_names:
            part = self.vit
            for step in name.split("."):
                part = getattr(part, step, None)
            if isinstance(part, nn.Module):
                found += [*part.parameters(), *part.buffers()]
            elif part is not None:
                found.append(part)
        return found

    def is_traced(self) -> bool:
        """Whether a graph is being made in which an operator makes the tables.

        Not where random positions are drawn, nor where a table is computed from parameters that the
        operator does not know.
        """
        if not torch.compiler.is_compiling() or self.number is None or self.draws_positions():
            return False
        tensors = self.position_tensors()
        return all(isinstance(x, nn.Parameter) or not x.requires_grad for x in tensors)

    def tables(
        self,
        tokens: int,
        what: str,
        prefix: int = 0,
        sides: Sequence[int] = (1,),
        views: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Return :meth:`make_tables`, which have so many rows, by an operator in a graph."""
        call = what, prefix, list(sides), list(views)
        if not self.is_traced():
            return self.make_tables(*call)
        given, rows = self.position_tensors(), self.grids.rows
        return torch.ops.uhd_ops._view_tables(given, rows, tokens, self.number, *call)

    def make_tables(
        self, what: str, prefix: int, sides: Sequence[int], views: Sequence[int]
    ) -> list[torch.Tensor]:
        """Make tables with a row for each token by loops over the grids; none for no positions.

        Args:
            what: ``"absolute"`` for what is added to the patches; or ``"rotary"`` for sine and
                cosine, one after the other, of each block where every block has its own.
            prefix: As for :meth:`rotary`, like the others.
            sides: One for all views, or one for each.
            views: Those that are wanted; none means all.
        """
        if what == "rotary":
            blocks = range(len(self.blocks)) if self.per_block else (0,)
            call = sides[0] if len(sides) == 1 else tuple(sides), prefix, tuple(views) or None
            return [table for index in blocks for table in self._rotary(index, *call)]
        tables = {grid: self.absolute(grid) for grid in dict.fromkeys(self.grids)}
        if any(table is None for table in tables.values()):
            return []
        return [torch.cat([tables[grid] for grid in self.grids])]

    # ---- attention, and what follows the blocks -----------------------------

    def _merged(self, tables: Tables, grid: Grid, side: int) -> Tables:
        if side == 1:
            return tables
        return merge_table(*tables, grid, side, self.merged_positions, self.frequencies())

    # ---- attention, and what follows the blocks -----------------------------

    @property
    def blocks(self) -> nn.Module:
        """The blocks."""
        return self.vit.get_submodule(self.blocks_name)

    def spec(self, index: int) -> BlockSpec:
        """A block by its parts as they are now."""
        return read_block(self.blocks[index])

    def scope(self, index: int, sides: Sides, prefix: int) -> ViewScope:
        """Which tokens of the packed sequence attend to which in a block; see :meth:`rotary`."""
        return ViewScope(self.merged_grids(sides), prefix, self.biases(index, sides))

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

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the last block, for ``(S, P, C)`` and ``(N, C)``."""
        return self.vit.norm(prefix), self.vit.norm(patches)

    def each(self, sides: Sides) -> tuple[int, ...]:
        """The side for each view."""
        return (sides,) * self.grids.num_views if isinstance(sides, int) else sides

    def merged_grids(self, sides: Sides) -> PackedGrids:
        """Grids of the views after merges."""
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
