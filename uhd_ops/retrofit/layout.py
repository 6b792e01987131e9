# SPDX-License-Identifier: Apache-2.0
"""How the sequence of a running forward pass is made up, and how its blocks learn of it.

A block sees tokens only, and their number does not tell the grid: 16 tokens are 4 x 4 or 2 x 8. The
model, which sees the image, leaves the layout here for the time of its forward pass; each thread
has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from uhd_ops.nn.positions import Frequencies, Rotary, merge_table


class TokenLayout(NamedTuple):
    """A sequence ``(B, P + h*w, C)``: ``prefix`` tokens, then the patches of one grid.

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

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)``."""
        return self.height, self.width

    def merged(self, window: int) -> TokenLayout:
        """The layout behind the compressor."""
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
        height, width, prefix = self[:3]
        if not self.holds(x):
            raise ValueError(
                f"x must hold {prefix} prefix tokens and {height} x {width} patches, "
                f"{prefix + height * width} tokens, got shape {tuple(x.shape)}"
            )

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the patches; prefix tokens pass unchanged."""
        merged = compressor(x[:, self.prefix :], self.grid, *given(positions))
        return torch.cat([x[:, : self.prefix], merged], dim=1) if self.prefix else merged

    def merge_table(
        self, sin: torch.Tensor, cos: torch.Tensor, window: int, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each merged token its sine and cosine; see ``nn.positions.merge_table``."""
        return merge_table(sin, cos, self.grid, window, positions, self.frequencies)


def given(positions: Rotary | None) -> tuple[Rotary, ...]:
    """The arguments that tell a compressor the positions: none where there are none.

    Pooling does not take any.
    """
    return () if positions is None else (positions,)


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
        if isinstance(value, torch.Tensor):
            if value.grad_fn is not None:
                passes = value.grad_fn.metadata.setdefault(_PASSES, [])
                if self not in passes:
                    passes.append(self)
                    with _LOCK:
                        _LIVE.add(self)
        elif isinstance(value, (Mapping, list, tuple)):
            for item in value.values() if isinstance(value, Mapping) else value:
                self.join_graph_of(item)


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
MODELS: WeakSet[nn.Module] = WeakSet()


def layout_of_every_image(block: nn.Module) -> Any:
    """The layout that the model of ``block`` has for all images; None if their sizes may differ."""
    with _LOCK:
        models = list(MODELS)
    owner = next((model for model in models if block in model._changed_blocks()), None)
    return None if owner is None else owner._layout_of_every_image()
