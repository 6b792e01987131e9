# SPDX-License-Identifier: Apache-2.0
"""Pixel-unshuffle, LayerNorm and the mean of each window in one pass, on native kernels."""

from __future__ import annotations

import torch

from uhd_ops import _native
from uhd_ops.windows import Windows


def unshuffle_norm(
    x: torch.Tensor,
    where: Windows,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    factor: int,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``z (M, f²C)``, normalised over each window, and the window means ``(M, C)``.

    The arguments are checked already; ``x`` is packed. The statistics and the arithmetic are in
    float32, float64 for float64. The means are empty unless ``residual``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = None if norm_weight is None else norm_weight.to(wide).contiguous()
    bias = None if norm_bias is None else norm_bias.to(wide).contiguous()
    z, mean, *_ = torch.ops.uhd_ops._unshuffle_norm(
        x, where.views, where.all_windows, weight, bias, eps, factor, residual
    )
    return z, mean


def _fake(x, views, num_windows, norm_weight, norm_bias, eps, factor, residual):
    channels = x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((num_windows, factor * factor * channels)),
        x.new_empty((num_windows if residual else 0, channels)),
        x.new_empty((num_windows,), dtype=wide),
        x.new_empty((num_windows,), dtype=wide),
    )


def _backward_fake(grad_z, grad_residual, x, views, norm_weight, mean, rstd, factor, affine):
    channels = grad_z.shape[1] if affine else 0
    grad_norm = (mean.new_empty((channels,)) for _ in range(2))
    return x.new_empty(x.shape), *grad_norm


def _setup_context(ctx, inputs, output):
    x, views, _, norm_weight, norm_bias, _, ctx.factor, ctx.residual = inputs
    _, _, mean, rstd = output
    ctx.affine = norm_weight is not None, norm_bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, views, norm_weight, mean, rstd)


def _backward(ctx, grad_z, grad_residual, *_):
    x, views, norm_weight, mean, rstd = ctx.saved_tensors
    grad_x, *grad_norm = torch.ops.uhd_ops._unshuffle_norm_backward(
        grad_z,
        grad_residual if ctx.residual else None,
        x,
        views,
        norm_weight,
        mean,
        rstd,
        ctx.factor,
        any(ctx.affine),
    )
    grad_weight, grad_bias = (
        grad if given else None for grad, given in zip(grad_norm, ctx.affine, strict=True)
    )
    return grad_x, None, None, grad_weight, grad_bias, None, None, None


if _native.status["cpu"] == "loaded":
    torch.library.register_fake("uhd_ops::_unshuffle_norm", _fake)
    torch.library.register_fake("uhd_ops::_unshuffle_norm_backward", _backward_fake)
    torch.library.register_autograd(
        "uhd_ops::_unshuffle_norm", _backward, setup_context=_setup_context
    )
    _native.refuse_second_derivative("unshuffle_norm", public="pixel_unshuffle_mlp")
