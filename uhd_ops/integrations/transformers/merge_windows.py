# SPDX-License-Identifier: Apache-2.0
"""Merging windows with the layers of somebody else's module."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.merge_with import merge_with
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.window_mean import window_mean


def merge_windows(
    x: torch.Tensor,
    grids: PackedGrids,
    norm: nn.Module,
    fc1: nn.Module,
    activation: nn.Module,
    fc2: nn.Module,
    *,
    window: int,
    residual: bool,
) -> torch.Tensor:
    """Return ``fc2(activation(fc1(norm(pixel_unshuffle(x)))))``, plus the mean if ``residual``.

    Args:
        x: Packed tokens ``(N, C)``.
        grids: Their grids.
        norm: LayerNorm over the ``window² * C`` channels.
        fc1: First layer.
        activation: Between the layers.
        fc2: Second layer.
        window: Side of a window.
        residual: Whether to add the mean of the window's tokens.
    """
    name = _activation_name(activation)
    classes = ((norm, nn.LayerNorm), (fc1, nn.Linear), (fc2, nn.Linear))
    if name is None or not all(_is_plain(module, cls) for module, cls in classes):
        # Quantised, adapted or watched modules are called, not read.
        y = fc2(activation(fc1(norm(pixel_unshuffle(x, grids, window)))))
        return y + window_mean(x, grids, window) if residual else y
    return merge_with(x, grids, norm, fc1, fc2, window=window, activation=name, residual=residual)


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling the module does nothing but what its class does with its parameters."""
    watched = module._forward_hooks or module._forward_pre_hooks
    watched = watched or module._backward_hooks or module._backward_pre_hooks
    return type(module) is cls and not watched and "forward" not in vars(module)


def _activation_name(activation: nn.Module) -> str | None:
    """What pixel_unshuffle_mlp calls it; None if it does not know it."""
    if _is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    cls = type(activation)
    known = f"{cls.__module__}.{cls.__qualname__}" == "transformers.activations.GELUTanh"
    return "gelu_tanh" if known and _is_plain(activation, cls) else None
