# SPDX-License-Identifier: Apache-2.0
"""What the classes of blocks become: mixins in front of a block's own class.

Block ``layer`` becomes a :class:`CompressedBlock`. The blocks behind it stay what they are, unless
they are given positions: then they become :class:`CoarseBlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from uhd_ops._reclass import Mixed
from uhd_ops.nn.early_compressor import EarlyCompressor
from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.layout import TokenLayout, layout_of_every_image, running_forward


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
    """

    prefix = "Compressed"
    compressor: nn.Module

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        layout = self._layout_of(x)
        if self.window > 1:
            layout = layout.merged(self.window)
        layout.check(x)
        positions = None
        if isinstance(self.compressor, EarlyCompressor):  # pooling knows no positions
            positions = self._positions(layout, *args, **kwargs)
        return layout.merge(super().forward(x, *args, **kwargs), self.compressor, positions)

    def _positions(self, layout: TokenLayout, *args: Any, **kwargs: Any) -> Rotary | None:
        """Rotary embeddings of the patches, from what the block is given beside the tokens."""
        return None


class CoarsePart(Mixed):
    """A module behind the compressor that needs its positions on the merged grid.

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
