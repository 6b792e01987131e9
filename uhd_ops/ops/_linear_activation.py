# SPDX-License-Identifier: Apache-2.0
"""A linear layer, its activation, and the mean over groups of rows: torch's GEMM, then one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from uhd_ops import _native

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "gelu": functional.gelu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "silu": functional.silu,
    "relu": functional.relu,
}
"""What the kernels compute, for layers that do not run them, by the name in the public API."""


def check_activation(activation: str) -> None:
    """Refuse what is no name of an activation."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")


def linear_activation(
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    group: int = 1,
) -> torch.Tensor:
    """Return ``activation(z weightᵀ + bias)``, averaged over each ``group`` of consecutive rows.

    Args:
        z: ``(R, I)``; the rows may lie apart, so that a slice of columns needs no copy.
        weight: ``(O, I)``.
        bias: ``(O,)`` or None.
        activation: Name of the activation.
        group: Rows to average; divides R.

    Returns:
        ``(R / group, O)``. Bias, activation and mean are computed in float32 (float64 for float64)
        from the products in the dtype of ``z``, and rounded once. Where cuBLASLt is
        enabled, the products need not have been rounded before.
    """
    bias = None if bias is None else bias.contiguous()
    # The products are kept for the backward pass only: without it no (R, O) tensor is made.
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (z, weight, bias)
    )
    hidden, _ = torch.ops.uhd_ops._linear_activation(
        z, weight, bias, activation, group, differentiated, _fused(z, activation, group)
    )
    return hidden


def _fused(z, activation, group):
    """Whether cuBLASLt may add the bias and apply the activation; ``u`` then includes the bias.

    If it has no kernel for the sizes and addresses at hand, ours runs after a product with bias, so
    that the meaning of ``u`` depends on this function only.
    """
    return (
        _native.cublaslt_enabled
        and z.is_cuda
        and z.dtype in (torch.bfloat16, torch.float16)
        and activation == "gelu_tanh"
        and group == 1
    )


def _fake(z, weight, bias, activation, group, save_products, fused):
    rows, width = z.shape[0], weight.shape[0]
    return z.new_empty((rows // group, width)), z.new_empty((rows if save_products else 0, width))


def _backward_fake(grad_h, u, bias, activation, group, grad_bias):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty((u.shape[1] if grad_bias else 0,), dtype=wide)


def _setup_context(ctx, inputs, output):
    z, weight, bias, ctx.activation, ctx.group, ctx.saved_products, fused = inputs
    ctx.bias_in_products = fused and ctx.saved_products
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, weight, bias, output[1])


def _backward(ctx, grad_h, _):
    z, weight, bias, u = ctx.saved_tensors
    if not ctx.saved_products:
        u = z @ weight.mT
    shift = None if ctx.bias_in_products else bias
    needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_u, grad_bias = torch.ops.uhd_ops._linear_activation_backward(
        grad_h, u, shift, ctx.activation, ctx.group, needs_bias
    )
    grad_z = grad_u @ weight if needs_z else None
    grad_weight = grad_u.mT @ z if needs_weight else None
    grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
    return grad_z, grad_weight, grad_bias, None, None, None, None


if _native.status["cpu"] == "loaded":
    torch.library.register_fake("uhd_ops::_linear_activation", _fake)
    torch.library.register_fake("uhd_ops::_linear_activation_backward", _backward_fake)
    torch.library.register_autograd(
        "uhd_ops::_linear_activation", _backward, setup_context=_setup_context
    )
    _native.refuse_second_derivative("linear_activation", public="pixel_unshuffle_mlp")
