# SPDX-License-Identifier: Apache-2.0
"""Small layers of the compressor, and how it takes them from its host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import is_plain
from uhd_ops.ops.tile_weight import tile_vector


class BlockLinear(nn.Module):
    """One linear layer for each patch of a window: patch p has a block of its own.

    Args:
        weight: ``(f², O, I)``; copied.
        bias: ``(f², O)``, or ``(O,)`` with ``summed``, or None; copied.
        summed: Whether to sum the products over the patches.

    Shape:
        x: ``(..., f², I)``.
        Result: ``(..., f², O)``, or ``(..., O)`` with ``summed``.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, summed: bool = False
    ) -> None:
        super().__init__()
        self.summed = summed
        self.weight = _parameter(weight)
        self.register_parameter("bias", _parameter(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply block p to patch p."""
        out = torch.einsum("...pi,poi->...o" if self.summed else "...pi,poi->...po", x, self.weight)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, summed={self.summed}"


class Limits(nn.Module):
    """Clamp the input and the output of a layer; the limits are copied, as buffers.

    Args:
        input_min: The least input, a number.
        input_max: The greatest.
        output_min: The least output.
        output_max: The greatest.
        enabled: Whether to clamp.
    """

    def __init__(
        self,
        input_min: torch.Tensor,
        input_max: torch.Tensor,
        output_min: torch.Tensor,
        output_max: torch.Tensor,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.enabled = enabled
        self.register_buffer("input_min", input_min.detach().clone())
        self.register_buffer("input_max", input_max.detach().clone())
        self.register_buffer("output_min", output_min.detach().clone())
        self.register_buffer("output_max", output_max.detach().clone())

    def forward(
        self, x: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return ``layer(x)`` with both clamped."""
        if not self.enabled:
            return layer(x)
        out = layer(x.clamp(self.input_min, self.input_max))
        return out.clamp(self.output_min, self.output_max)

    def extra_repr(self) -> str:
        """Show whether it clamps."""
        return f"enabled={self.enabled}"


class LayerScale(nn.Module):
    """Multiply channel c by ``gamma[c]``; ``gamma`` is copied."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.gamma = _parameter(gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``(..., C)``."""
        return x * self.gamma


class PartView(nn.Module):
    """A part of somebody else's module, read there whenever it is used.

    It holds no parameters of its own, so what was trained, loaded or replaced since takes effect,
    and gradients arrive where the parameters are.
    """

    def clone(self) -> nn.Module:
        """Return an ordinary module with copies of the parameters."""
        raise NotImplementedError


class LinearView(PartView):
    """Rows or columns of a linear layer, or one with its bias elsewhere, as a layer of its own.

    A layer that is not plain (adapted, quantised, hooked) is called as a whole, with zeros in the
    other columns, and what it returns in the rows is taken.

    Args:
        layer: The layer; its weight is ``(O, I)``.
        rows: Its outputs, first and behind the last; None for all.
        columns: Its inputs; likewise.
        bias: Whether to add the layer's own bias; or a function that returns another one.
        calls: Whether to call a layer that is not plain. If not, its weight is read all the same,
            as hosts do that add a bias of their own.
        shape: The shape that the weight of ``layer`` should have, where that is known.
    """

    def __init__(
        self,
        layer: nn.Module,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        bias: bool | Callable[[], torch.Tensor | None] = True,
        *,
        calls: bool = True,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.calls, self.shape = layer, calls, shape
        self.rows, self.columns, self.source_of_bias = rows, columns, bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the part."""
        weight = self.layer.weight
        weight = weight if self.rows is None else weight[slice(*self.rows)]
        return weight if self.columns is None else weight[:, slice(*self.columns)]

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the part, if any."""
        if callable(self.source_of_bias):
            return self.source_of_bias()
        bias = self.layer.bias if self.source_of_bias else None
        return bias if bias is None or self.rows is None else bias[slice(*self.rows)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if not self.calls or is_plain(self.layer, nn.Linear):
            return functional.linear(x, self.weight, self.bias)
        if self.columns is not None:
            first, end = self.columns
            x = functional.pad(x, (first, self.layer.in_features - end))
        out = self._call(x)
        if self.source_of_bias is True:
            return out
        if self.layer.bias is not None:
            out = out - self._call(torch.zeros_like(x[..., :1, :]))
        bias = self.bias
        return out if bias is None else out + bias

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out if self.rows is None else out[..., slice(*self.rows)]

    def clone(self) -> nn.Module:
        """Return a Linear."""
        return linear_of(self.weight, self.bias)


class ScaleView(PartView):
    """LayerScale factors that somebody else's module holds.

    Args:
        owner: The module that holds the factors ``(C,)``.
        name: Its attribute.
        calls: Whether the module is a LayerScale, and is called.
    """

    def __init__(self, owner: nn.Module, name: str, *, calls: bool) -> None:
        super().__init__()
        self.owner, self.name, self.calls = owner, name, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``(..., C)``."""
        return self.owner(x) if self.calls else x * getattr(self.owner, self.name)

    def clone(self) -> nn.Module:
        """Return a LayerScale."""
        return LayerScale(getattr(self.owner, self.name))


def clone_module(module: nn.Module | torch.Tensor | None) -> nn.Module:
    """Copy a module with its parameters, buffers and submodules.

    None becomes an Identity, and a tensor, which are the factors of a LayerScale, a LayerScale.

    The parameters are new and trainable. Unlike ``copy.deepcopy``, it leaves the hooks behind: what
    somebody observes in the host is not what the compressor does. Likewise ``module.compile()``,
    which leaves a function in the module that reads the weights of that one.
    """
    if module is None:
        return nn.Identity()
    if isinstance(module, torch.Tensor):
        return LayerScale(module)
    if isinstance(module, PartView):
        return module.clone()
    clone = type(module).__new__(type(module))
    nn.Module.__init__(clone)
    vars(clone).update(vars(module) | vars(clone))
    vars(clone).pop("_compiled_call_impl", None)
    clone.training = module.training
    for name, parameter in module._parameters.items():
        clone.register_parameter(name, _parameter(parameter))
    for name, buffer in module._buffers.items():
        copied = None if buffer is None else buffer.detach().clone()
        clone.register_buffer(name, copied, name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        clone.add_module(name, None if child is None else clone_module(child))
    return clone


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a Linear with copies of ``weight (O, I)`` and ``bias (O,)``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = _parameter(weight)
    linear.register_parameter("bias", _parameter(bias))
    return linear


def tile_norm(norm: nn.Module | None, patches: int) -> nn.Module:
    """Return a norm over ``patches * C`` channels that repeats the affine map of ``norm`` over C.

    LayerNorms become ``torch.nn.LayerNorm``; any other class with a ``weight`` over C, such as the
    RMSNorms, is copied with its weight repeated. None is Identity.
    """
    if norm is None:
        return nn.Identity()
    if isinstance(norm, nn.LayerNorm):
        tiled = nn.LayerNorm(
            patches * norm.normalized_shape[0],
            norm.eps,
            elementwise_affine=norm.weight is not None,
            bias=norm.bias is not None,
            device="meta",
        )
    else:
        tiled = clone_module(norm)
        if hasattr(norm, "normalized_shape"):
            tiled.normalized_shape = (patches * norm.normalized_shape[0],)
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            parameter = nn.Parameter(tile_vector(parameter.detach(), patches))
        tiled.register_parameter(name, parameter)
    return tiled


def _parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())
