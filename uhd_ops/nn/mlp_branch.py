# SPDX-License-Identifier: Apache-2.0
"""The MLP branch of a transformer block, on whole windows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.grids import Grids
from uhd_ops.nn.block_spec import MlpSpec
from uhd_ops.nn.layers import Weights, clone_module, post_of, tile_norm
from uhd_ops.nn.merge_with import merge_with
from uhd_ops.nn.mlp_forms import MlpWeights, convert_mlp
from uhd_ops.nn.regularization import drop_views
from uhd_ops.ops._linear_activation import ACTIVATIONS
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.window_mean import window_mean


class WindowMlp(nn.Module):
    """``post(fc2(activation(fc1(norm(pixel_unshuffle(x))))))``, with the host's weights tiled.

    The norm in front is over all f²C channels of a window. Norms inside the MLP stay per patch, so
    behind the first norm the branch starts as the mean of what the host's MLP does to each patch.

    Args:
        host: The branch whose parts are tiled and copied.
        dim: Channels C of a token.
        window: Side f of a window, in tokens.
        form: Weight form: ``"dense"``, ``"block"`` or ``"tied"``; a gate has the form of fc1.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid.
        Result: ``(M, C)``, or ``(B, M / B, C)``.
    """

    def __init__(self, host: MlpSpec, dim: int, window: int, form: str) -> None:
        super().__init__()
        self.dim, self.window, self.form = dim, window, form
        self.activation = host.activation
        self.hidden_dropout, self.drop_path = host.hidden_dropout, host.drop_path
        self.norm = tile_norm(host.norm, window**2)
        self.patch_norm = clone_module(host.patch_norm)
        limits = host.limits.get
        with torch.no_grad():
            *fc1, fc2_weight, fc2_bias = self._tile(host.fc1, host.fc2)
            self.fc1 = Weights(*fc1, limits("fc1"))
            self.fc2 = Weights(fc2_weight, fc2_bias, limits("fc2"))
            self.gate = None
            if host.gate is not None:
                self.gate = Weights(*self._tile(host.gate, host.fc2)[:2], limits("gate"))
        self.inner_norm = clone_module(host.inner_norm)
        self.output_drop = nn.Dropout(host.output_dropout)
        self.post = post_of(host.post)

    def _tile(self, fc1: nn.Module, fc2: nn.Module) -> MlpWeights:
        weights = MlpWeights(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return convert_mlp(weights, self.form, factor=self.window, channels=self.dim)

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """Return the branch; with ``residual``, plus the mean over the tokens of each window."""
        fused = self._is_fused()
        dropped = self.hidden_dropout or self.output_drop.p or self.drop_path
        if fused and isinstance(self.post, nn.Identity) and not (self.training and dropped):
            return self._fused(x, grids, residual)
        if fused and not (self.training and self.hidden_dropout):
            branch = self._fused(x, grids, residual=False)
        else:
            branch = self._composed(x, grids)
        branch = self.post(self.output_drop(branch))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids, self.window)
        return window_mean(x, grids, self.window) + branch if residual else branch

    def _is_fused(self) -> bool:
        """Whether the operator computes this MLP."""
        inner = (self.patch_norm, self.inner_norm)
        return (
            self.gate is None
            and all(isinstance(norm, nn.Identity) for norm in inner)
            and self.fc1.limits is None
            and self.fc2.limits is None
            and isinstance(self.norm, nn.LayerNorm)
        )

    def _fused(self, x: torch.Tensor, grids: Grids, residual: bool) -> torch.Tensor:
        return merge_with(
            x,
            grids,
            self.norm,
            self.fc1,
            self.fc2,
            window=self.window,
            activation=self.activation,
            residual=residual,
        )

    def _composed(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """The branch by the steps of its definition; any norm, gate and dropout."""
        merged = self.norm(pixel_unshuffle(x, grids, self.window))
        patches = self.patch_norm(merged.unflatten(-1, (self.window**2, self.dim)))
        act = ACTIVATIONS[self.activation]
        hidden = self._clamped(self._first, self.fc1, patches)
        if self.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(self._clamped(self._first, self.gate, patches)) * hidden
        hidden = functional.dropout(hidden, self.hidden_dropout, self.training)
        return self._clamped(self._second, self.fc2, self.inner_norm(hidden))

    def _clamped(
        self,
        product: Callable[[Weights, torch.Tensor], torch.Tensor],
        layer: Weights,
        x: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``product(layer, x)`` within the limits of the layer."""
        if layer.limits is None:
            return product(layer, x)
        return layer.limits(x, functools.partial(product, layer))

    def _first(self, layer: Weights, patches: torch.Tensor) -> torch.Tensor:
        """``(..., f², C)`` to ``(..., f², I)``."""
        if self.form == "tied":
            return functional.linear(patches, layer.weight, layer.bias)
        if self.form == "dense":
            hidden = functional.linear(patches.flatten(-2), layer.weight, layer.bias)
            return hidden.unflatten(-1, (self.window**2, -1))
        hidden = torch.einsum("...pc,pic->...pi", patches, layer.weight)
        return hidden if layer.bias is None else hidden + layer.bias

    def _second(self, layer: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """``(..., f², I)`` to ``(..., C)``."""
        weight, bias = layer.weight, layer.bias
        if self.form == "tied":
            return functional.linear(hidden.mean(-2), weight, bias)
        if self.form == "dense":
            return functional.linear(hidden.flatten(-2), weight, bias)
        out = torch.einsum("...pi,pci->...c", hidden, weight)
        return out if bias is None else out + bias

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"window={self.window}, form={self.form!r}, activation={self.activation!r}"
