# SPDX-License-Identifier: Apache-2.0
"""The MLP branch of a transformer block on whole windows, and what may stand in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.grids import Grids
from uhd_ops.nn.attention import drop_views
from uhd_ops.nn.block_spec import MlpSpec
from uhd_ops.nn.layers import BlockLinear, clone_module, is_plain, linear_of, tile_norm
from uhd_ops.nn.mlp_forms import MlpWeights, tied_to_block, tied_to_dense
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.pixel_unshuffle_mlp import ACTIVATIONS, pixel_unshuffle_mlp
from uhd_ops.ops.window_mean import window_mean


def merge_windows(
    x: torch.Tensor,
    grids: Grids,
    norm: nn.Module,
    fc1: nn.Module,
    fc2: nn.Module,
    *,
    window: int,
    activation: str | nn.Module,
    residual: bool,
) -> torch.Tensor:
    """Return ``fc2(activation(fc1(norm(pixel_unshuffle(x)))))``, plus the mean if ``residual``.

    Where the layers are exactly plain, the operator reads their weights. A layer that is not
    (adapted, quantised, hooked, offloaded) is called, and so are the others.

    Args:
        x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid.
        grids: Their grids.
        norm: LayerNorm over the ``window² * C`` channels.
        fc1: First layer, over all channels of a window.
        fc2: Second layer.
        window: Side of a window, in tokens.
        activation: As for :func:`uhd_ops.pixel_unshuffle_mlp`, or a module.
        residual: Whether to add the mean of the window's tokens.

    Returns:
        Merged tokens ``(M, D)``, or ``(B, M / B, D)``, with D the outputs of ``fc2``.
    """
    name = activation if isinstance(activation, str) else _activation_name(activation)
    if name is not None and _are_plain(norm, fc1, fc2):
        return _read_layers(
            x, grids, norm, fc1, fc2, window=window, activation=name, residual=residual
        )
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    y = fc2(act(fc1(norm(pixel_unshuffle(x, grids, window)))))
    return y + window_mean(x, grids, window) if residual else y


class WindowMlp(nn.Module):
    """``post(fc2(activation(fc1(norm(pixel_unshuffle(x))))))``, with the host's weights tiled.

    The norm in front is over all f²C channels of a window. Norms inside the MLP stay per patch, so
    behind the first norm the branch starts as the mean of what the host's MLP does to each patch.

    The layers are ordinary modules: ``torch.nn.Linear`` in the dense form, over the f²C channels of
    a window, and in the tied form, over the C of a patch; :class:`BlockLinear` in the block form.
    One operator computes the branch from their weights where all of them are exactly plain;
    otherwise they are called, so adapters, hooks, quantised and offloaded weights take effect.

    Args:
        spec: The branch whose parts are tiled and copied.
        dim: Channels C of a token.
        window: Side f of a window, in tokens.
        form: Weight form: ``"dense"``, ``"block"`` or ``"tied"``; a gate has the form of fc1.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid.
        Result: ``(M, C)``, or ``(B, M / B, C)``.
    """

    def __init__(self, spec: MlpSpec, dim: int, window: int, form: str) -> None:
        super().__init__()
        self.dim, self.window, self.form = dim, window, form
        self.activation = spec.activation
        self.hidden_dropout, self.drop_path = spec.hidden_dropout, spec.drop_path
        self.norm = tile_norm(spec.norm, window**2)
        self.patch_norm = clone_module(spec.patch_norm)
        with torch.no_grad():
            self.fc1, self.fc2 = self._tile(spec.fc1, spec.fc2)
            self.gate = None if spec.gate is None else self._tile(spec.gate, spec.fc2)[0]
        self.inner_norm = clone_module(spec.inner_norm)
        self.limits = nn.ModuleDict({n: clone_module(limits) for n, limits in spec.limits.items()})
        self.output_drop = nn.Dropout(spec.output_dropout)
        self.post = clone_module(spec.post)

    def _tile(self, fc1: nn.Module, fc2: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Make both layers in the form of this MLP from those for one patch."""
        weights = MlpWeights(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if self.form == "block":
            weights = tied_to_block(weights, factor=self.window)
            return BlockLinear(*weights[:2]), BlockLinear(*weights[2:], summed=True)
        if self.form == "dense":
            weights = tied_to_dense(weights, factor=self.window)
        return linear_of(*weights[:2]), linear_of(*weights[2:])

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """Return the branch; with ``residual``, plus the mean over the tokens of each window."""
        drops = self.training and (self.hidden_dropout or self.output_drop.p or self.drop_path)
        if self.reads_layers():
            ends_here = not drops and isinstance(self.post, nn.Identity)
            branch = _read_layers(
                x,
                grids,
                self.norm,
                self.fc1,
                self.fc2,
                window=self.window,
                activation=self.activation,
                residual=residual and ends_here,
            )
            if ends_here:
                return branch
        else:
            branch = self._call_layers(x, grids)
        branch = self.post(self.output_drop(branch))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids, self.window)
        return window_mean(x, grids, self.window) + branch if residual else branch

    def reads_layers(self) -> bool:
        """Whether the operator computes this MLP from the weights of its layers, now."""
        return (
            self.gate is None
            and not self.limits
            and not (self.training and self.hidden_dropout)
            and type(self.patch_norm) is nn.Identity
            and type(self.inner_norm) is nn.Identity
            and _are_plain(self.norm, self.fc1, self.fc2)
        )

    def _call_layers(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """The branch by the steps of its definition: any norm, layer, gate and dropout."""
        merged = self.norm(pixel_unshuffle(x, grids, self.window))
        patches = self.patch_norm(merged.unflatten(-1, (self.window**2, self.dim)))
        act = ACTIVATIONS[self.activation]
        hidden = self._limited("fc1", functools.partial(self._first, self.fc1), patches)
        if self.gate is None:
            hidden = act(hidden)
        else:
            gate = self._limited("gate", functools.partial(self._first, self.gate), patches)
            hidden = act(gate) * hidden
        hidden = functional.dropout(hidden, self.hidden_dropout, self.training)
        return self._limited("fc2", self._second, self.inner_norm(hidden))

    def _limited(
        self, name: str, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Return ``layer(x)`` within the limits of that name, if there are any."""
        return self.limits[name](x, layer) if name in self.limits else layer(x)

    def _first(self, layer: nn.Module, patches: torch.Tensor) -> torch.Tensor:
        """``(..., f², C)`` to ``(..., f², I)``."""
        if self.form == "dense":
            return layer(patches.flatten(-2)).unflatten(-1, (self.window**2, -1))
        return layer(patches)

    def _second(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(..., f², I)`` to ``(..., C)``: over the whole window, or per patch and then merged."""
        if self.form == "dense":
            return self.fc2(hidden.flatten(-2))
        if self.form == "tied":  # the mean first: one product instead of f²
            return self.fc2(hidden.mean(-2))
        return self.fc2(hidden)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"window={self.window}, form={self.form!r}, activation={self.activation!r}"


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
        layers = self.norm, self.fc1, self.fc2
        return merge_windows(
            x, grids, *layers, window=self.window, activation="gelu", residual=residual
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


def _are_plain(norm: nn.Module, fc1: nn.Module, fc2: nn.Module) -> bool:
    linear = BlockLinear if type(fc1) is BlockLinear else nn.Linear
    return is_plain(norm, nn.LayerNorm) and is_plain(fc1, linear) and is_plain(fc2, linear)


def _read_layers(
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


def _activation_name(activation: nn.Module) -> str | None:
    """What the operator calls the activation of somebody else's module; None for any other."""
    if is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    cls = type(activation)
    known = f"{cls.__module__}.{cls.__qualname__}" == "transformers.activations.GELUTanh"
    return "gelu_tanh" if known and is_plain(activation, cls) else None
