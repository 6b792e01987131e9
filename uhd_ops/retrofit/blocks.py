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
from uhd_ops.retrofit.layout import TokenLayout, running_forward


class LayoutAware(Mixed):
    """A block that knows the layout of the tokens in the running forward pass.

    Attributes:
        layout_while_tracing: Stands in for the context variable under torch.compile, which cannot
            trace one; None otherwise.
    """

    layout_while_tracing: TokenLayout | None = None

    def _layout_of(self, x: torch.Tensor) -> TokenLayout:
        if self.layout_while_tracing is not None:
            return self.layout_while_tracing
        running = None if torch.compiler.is_compiling() else running_forward(x)
        if running is None:
            raise RuntimeError(
                "the patch grid of these tokens is not known: a block with a compressor, or behind "
                "it, runs in the forward pass of its model; if it is checkpointed, then alone or "
                "with the whole model, with use_reentrant=False and no save_on_cpu around it"
            )
        return running.layout


class CompressedBlock(LayoutAware):
    """A block whose patch tokens are merged after its own body.

    Attributes:
        compressor: The module that merges them.
        merged_before: Side, in fine tokens, of the windows that other compressors merged before.
    """

    prefix = "Compressed"
    compressor: nn.Module
    merged_before: int = 1

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``(B, P + h*w, C)`` to ``(B, P + ceil(h / window) * ceil(w / window), C)``."""
        layout = self._layout_of(x)
        if self.merged_before > 1:
            layout = layout.merged(self.merged_before)
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
        if self.layout_while_tracing is not None:
            return derive(source)
        return running_forward(x).derived(source, self.window, derive)
