# SPDX-License-Identifier: Apache-2.0
"""``pixel_unshuffle_mlp`` with the parameters of modules."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import Grids
from uhd_ops.ops.pixel_unshuffle_mlp import pixel_unshuffle_mlp


def merge_with(
    x: torch.Tensor,
    grids: Grids,
    norm: nn.Module,
    fc1: nn.Module,
    fc2: nn.Module,
    *,
    window: int,
    activation: str,
    residual: bool,
) -> torch.Tensor:
    """Return ``fc2(activation(fc1(norm(pixel_unshuffle(x)))))``, plus the mean if ``residual``.

    The modules are read, not called: their hooks do not run.

    Args:
        x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid.
        grids: Their grids.
        norm: LayerNorm over the ``window² * C`` channels.
        fc1: First layer; its weight has one of the forms of :func:`uhd_ops.pixel_unshuffle_mlp`.
        fc2: Second layer; likewise.
        window: Side of a window, in tokens.
        activation: As for :func:`uhd_ops.pixel_unshuffle_mlp`.
        residual: Whether to add the mean of the window's tokens.

    Returns:
        Merged tokens ``(M, D)``, or ``(B, M / B, D)``, with D the outputs of ``fc2``.
    """
    return pixel_unshuffle_mlp(
        x,
        grids,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=norm.eps,
        factor=window,
        activation=activation,
        residual=residual,
    )
