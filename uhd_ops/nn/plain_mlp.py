# SPDX-License-Identifier: Apache-2.0
"""What stands in for the reused MLP in the ablations: a small MLP of its own, or none."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import Grids
from uhd_ops.nn.merge_with import merge_with
from uhd_ops.ops.window_mean import window_mean


class PlainMlp(nn.Module):
    """``fc2(gelu(fc1(norm(pixel_unshuffle(x)))))`` from f²C over f²C to C channels.

    It takes no weights from the host and starts with torch's own initialisation.

    Args:
        dim: Channels C of a token.
        window: Side f of a window, in tokens.
        like: Parameters are made on its device and in its dtype.

    Source:
        LLaVA-UHD v4, Table 4: "Pixel-unshuffle MLP" and "Window attention with MLP".
    """

    def __init__(self, dim: int, window: int, like: torch.Tensor) -> None:
        super().__init__()
        factory = {"device": like.device, "dtype": like.dtype}
        wide = window**2 * dim
        self.window = window
        self.norm = nn.LayerNorm(wide, eps=1e-6, **factory)
        self.fc1 = nn.Linear(wide, wide, **factory)
        self.fc2 = nn.Linear(wide, dim, **factory)

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """``(N, C)`` to ``(M, C)``; with ``residual``, plus the mean of each window."""
        return merge_with(
            x,
            grids,
            self.norm,
            self.fc1,
            self.fc2,
            window=self.window,
            activation="gelu",
            residual=residual,
        )


class NoMlp(nn.Module):
    """The mean of each window and nothing else.

    Args:
        window: Side of a window, in tokens.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """``(N, C)`` to ``(M, C)``."""
        mean = window_mean(x, grids, self.window)
        return mean if residual else torch.zeros_like(mean)

    def extra_repr(self) -> str:
        """Show the side of a window."""
        return f"window={self.window}"
