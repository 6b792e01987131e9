# SPDX-License-Identifier: Apache-2.0
"""Small layers of the compressor, and how it takes them from its host."""

from __future__ import annotations

import torch
from torch import nn


class Weights(nn.Module):
    """A weight and a bias that an operator reads; copies of the tensors given.

    Args:
        weight: Weight in any shape.
        bias: Bias in any shape, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.register_parameter("bias", _parameter(bias))

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class LayerScale(nn.Module):
    """Multiply channel c by ``gamma[c]``; ``gamma`` is copied."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.gamma = _parameter(gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``(..., C)``."""
        return x * self.gamma


def layer_scale_of(gamma: torch.Tensor | None) -> nn.Module:
    """Return a LayerScale, or an Identity where the host has none."""
    return nn.Identity() if gamma is None else LayerScale(gamma)


def clone_leaf(module: nn.Module | None) -> nn.Module:
    """Copy a module without submodules and buffers, such as a Linear or a norm; None is Identity.

    The parameters are new and trainable. Unlike ``copy.deepcopy``, it leaves the hooks behind: what
    somebody observes in the host is not what the compressor does.
    """
    if module is None:
        return nn.Identity()
    clone = type(module).__new__(type(module))
    nn.Module.__init__(clone)
    own = {name: value for name, value in vars(module).items() if name not in vars(clone)}
    vars(clone).update(own)
    for name, parameter in module._parameters.items():
        clone.register_parameter(name, _parameter(parameter))
    return clone


def tile_norm(norm: nn.LayerNorm, patches: int) -> nn.LayerNorm:
    """Return a LayerNorm over ``patches * C`` channels that repeats the affine map of ``norm``."""
    tiled = nn.LayerNorm(
        patches * norm.normalized_shape[0],
        norm.eps,
        elementwise_affine=norm.weight is not None,
        bias=norm.bias is not None,
        device="meta",
    )
    for name, parameter in norm._parameters.items():
        repeated = None if parameter is None else parameter.detach().repeat(patches)
        tiled.register_parameter(name, _parameter(repeated))
    return tiled


def _parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())
