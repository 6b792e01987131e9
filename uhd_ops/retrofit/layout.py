# SPDX-License-Identifier: Apache-2.0
"""How the sequence of a running forward pass is made up, and how its blocks learn of it.

A block sees tokens only, and their number does not tell the grid: 16 tokens are 4 x 4 or 2 x 8. The
model, which sees the image, leaves the layout here for the time of its forward pass; each thread
has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

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

    def check(self, x: torch.Tensor) -> None:
        """Refuse tokens of another number: something added or dropped some."""
        height, width, prefix = self[:3]
        if x.shape[1] != prefix + height * width:
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

    Attributes:
        layout: How its tokens are laid out.
        tables: What blocks derived from a tensor that several of them are given, by its id and the
            side of the windows.
    """

    def __init__(self, layout: Any) -> None:
        self.layout = layout
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


RUNNING: ContextVar[RunningForward | None] = ContextVar("the running forward pass", default=None)
# Gradient checkpointing runs a block again during the backward pass, when no model is running: the
# tokens that went into the block are then the same tensor, which leads back to their forward pass.
RUNNING_OF_TOKENS = WeakTensorKeyDictionary()


def run_with(layout: Any, method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``method`` while blocks can find ``layout``; not for tracing."""
    token = RUNNING.set(RunningForward(layout))
    try:
        return method(**arguments)
    finally:
        RUNNING.reset(token)


def running_forward(x: torch.Tensor) -> RunningForward | None:
    """Find the forward pass that the tokens ``x`` belong to."""
    running = RUNNING.get()
    if running is None:
        return RUNNING_OF_TOKENS.get(x)
    if torch.is_grad_enabled():
        RUNNING_OF_TOKENS[x] = running
    return running
