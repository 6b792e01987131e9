# SPDX-License-Identifier: Apache-2.0
"""Pixel-unshuffle, LayerNorm and MLP: the f x f tokens of a window become one merged token.

Two native operators do what torch's products do not: ``_unshuffle_norm`` in front of the MLP, and
``_linear_activation``, whose kernels follow the product of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from uhd_ops import _checks, _native, reference, windows
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids
from uhd_ops.windows import TokenOrder, Windows

Activation = Literal["gelu_tanh", "gelu", "quick_gelu", "silu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "gelu": functional.gelu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "silu": functional.silu,
    "relu": functional.relu,
}
"""What the kernels compute, for layers that do not run them, by the name in the public API."""


def check_activation(activation: object) -> None:
    """Refuse what is not the name of an activation."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")


def pixel_unshuffle_mlp(
    x: torch.Tensor,
    grids: Grids,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    factor: int = 2,
    activation: Activation = "gelu_tanh",
    residual: bool = True,
    order_in: TokenOrder = "raster",
) -> torch.Tensor:
    """Merge each window of tokens into one: ``mean(x) + fc2(activation(fc1(norm(unshuffle(x)))))``.

    The ``factor²`` tokens of a window, in raster order, are concatenated to one row of
    ``factor² * C`` channels, which a LayerNorm normalises as a whole; a ragged window at the right
    or bottom edge repeats the nearest token that is present. The residual is the mean over the
    tokens present.

    The MLP has one of three weight forms, which the shape of ``fc1_weight`` tells apart:

    ======  ==================  ============  ==================  ===============================
    form    ``fc1_weight``      ``fc1_bias``  ``fc2_weight``      hidden layer
    ======  ==================  ============  ==================  ===============================
    dense   ``(J, f²C)``        ``(J,)``      ``(C_out, J)``      every patch sees every channel
    block   ``(f², I, C)``      ``(f², I)``   ``(f², C_out, I)``  patch p has blocks p; outputs add
    tied    ``(I, C)``          ``(I,)``      ``(C_out, I)``      one FFN for all patches; hidden
                                                                  averaged over the f² patches
    ======  ==================  ============  ==================  ===============================

    With ``factor=1`` dense and tied are the same network. :mod:`uhd_ops.nn.mlp_forms` converts
    between the forms.

    The normalised window and the mean depend on the window's own tokens only, bit for bit. The two
    layers are torch's matrix products: the same call gives the same bits, but a window may differ
    in its last bits where the number of windows or threads, or the memory layout, is another.

    Args:
        x: Packed tokens ``(N, C)``, or ``(B, h*w, C)`` with one ``(h, w)`` grid; C >= 1. float32,
            float64, bfloat16 or float16. All other tensors have the dtype of ``x``, except under
            autocast.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        fc1_weight: Weight of the first layer, see the table.
        fc1_bias: Its bias or None.
        fc2_weight: Weight of the second layer; ``C_out`` must be C where ``residual`` is set.
        fc2_bias: Its bias ``(C_out,)`` or None; added once in every form.
        norm_weight: Scale ``(f²C,)`` of the LayerNorm, or None for ones; may be float32 beside an
            ``x`` in half precision.
        norm_bias: Shift ``(f²C,)`` of the LayerNorm, or None for zeros; likewise.
        eps: Added to the variance, which is over all f²C channels.
        factor: Side f of a window, in tokens.
        activation: ``"gelu_tanh"``, ``"gelu"`` (the exact one, with erf), ``"quick_gelu"``,
            ``"silu"`` or ``"relu"``.
        residual: Whether to add the mean of the window's tokens.
        order_in: Order of the tokens inside each view, as for :func:`uhd_ops.pixel_unshuffle`.

    Returns:
        Merged tokens ``(M, C_out)`` in raster order, or ``(B, M / B, C_out)`` for batched ``x``, in
        the dtype of ``x``. Under autocast the normalisation and the residual keep the precision of
        ``x``, the two layers and the activation run in the autocast dtype, and so does the result
        if there is no residual.

    Raises:
        TypeError: A tensor has another dtype than ``x`` or none of the four, or an argument has the
            wrong type.
        ValueError: Shapes, devices or grids do not fit, the weights have the shapes of no weight
            form, ``factor < 1``, ``eps`` is negative or not finite, the activation is unknown, or
            ``order_in`` is not a token order.

    Source:
        LLaVA-UHD v4, section 3.2: the reused MLP of the intra-ViT compressor.

    Example:
        >>> x, grids = torch.randn(4 * 6 + 3 * 5, 8), [(4, 6), (3, 5)]
        >>> fc1, fc2 = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)  # tied: one FFN per patch
        >>> pixel_unshuffle_mlp(x, grids, fc1.weight, fc1.bias, fc2.weight, fc2.bias).shape
        torch.Size([12, 8])
    """
    mlp = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    found, direct = _check(
        (x, *mlp, norm_weight, norm_bias), grids, (eps, factor, activation, residual, order_in)
    )
    where, sides, form = found
    if direct is not None:
        norm = norm_weight, norm_bias
        if form != "block" and _differentiated(x, *norm, fc1_weight, fc1_bias):
            layer = fc1_weight, fc1_bias, activation, factor**2 if form == "tied" else 1
            hidden, mean = _norm_and_layer(x, where, *norm, eps, factor, residual, *layer)
            y = functional.linear(hidden, fc2_weight, fc2_bias)
        else:
            z, mean = unshuffle_norm(x, where, *norm, eps, factor, residual, direct=True)
            y = _mlp(z, *mlp, form, factor, activation, True)
        return y + mean if residual else y
    if not _native.has_kernels(x.device):
        return reference.pixel_unshuffle_mlp(
            x,
            grids,
            *mlp,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            factor=factor,
            activation=activation,
            residual=residual,
            order_in=order_in,
        )
    x, where = windows.arrange(where.pack(x), where, sides)
    z, mean = unshuffle_norm(x, where, norm_weight, norm_bias, eps, where.window, residual)
    y = _mlp(*_checks.autocast(z, *mlp), form, where.window, activation)
    y = y.to(x.dtype) + mean if residual else y
    return where.unpack_windows(where.zero_padding(y))


def _check(x, *arguments) -> Checked:
    *mlp, norm_weight, norm_bias, grids, eps, factor, activation, residual, order_in = arguments
    factor = _check_options(eps, factor, activation, residual)
    _checks.check_tensor(x, "x")
    sides = windows.check_order(order_in, "order_in", factor)
    where = windows.locate(x, "x", grids, factor, ("C",))
    form = _check_parameters(x, mlp, (norm_weight, norm_bias), factor, residual)
    direct = sides == () and _checks.stay_as_they_are(x, *mlp)
    return (where, sides, form), where.direct(x) if direct else None


_check = checked_once(_check, optional=True)


def mlp_form(fc1_weight: torch.Tensor, channels: int, factor: int) -> str | None:
    """Read the weight form, "dense", "block" or "tied", from the shape of fc1's weight.

    Three dimensions mean block. Two mean dense where the last is ``factor² * channels`` and tied
    where it is ``channels``. With ``factor=1`` the two are the same network; it counts as dense.

    Returns:
        The form, or None where the shape fits none.
    """
    if fc1_weight.dim() == 3:
        return "block" if fc1_weight.shape[::2] == (factor**2, channels) else None
    if fc1_weight.dim() != 2 or fc1_weight.shape[1] not in (factor**2 * channels, channels):
        return None
    return "dense" if fc1_weight.shape[1] == factor**2 * channels else "tied"


def _mlp(
    z, fc1_weight, fc1_bias, fc2_weight, fc2_bias, form, factor, activation, direct=False
) -> torch.Tensor:
    if form == "dense":
        hidden = linear_activation(z, fc1_weight, fc1_bias, activation, direct=direct)
        return functional.linear(hidden, fc2_weight, fc2_bias)
    patches, channels = factor**2, z.shape[1] // factor**2
    if form == "tied":
        rows = z.view(-1, channels)
        hidden = linear_activation(rows, fc1_weight, fc1_bias, activation, patches, direct)
        return functional.linear(hidden, fc2_weight, fc2_bias)
    # Blocks of z and of the weights are views, and one patch's hidden layer is alive at a time.
    y = None
    for p, patch in enumerate(z.split(channels, dim=1)):
        bias = None if fc1_bias is None else fc1_bias[p]
        hidden = linear_activation(patch, fc1_weight[p], bias, activation, direct=direct)
        if y is None:
            y = functional.linear(hidden, fc2_weight[p], fc2_bias)
        else:
            y = torch.addmm(y, hidden, fc2_weight[p].mT)
    return y


def _check_options(eps, factor, activation, residual) -> int:
    """Check the options; return ``factor`` as an int."""
    factor = _checks.check_positive_int(factor, "factor")
    if _checks.check_finite(eps, "eps") < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    check_activation(activation)
    if not isinstance(residual, bool):
        raise TypeError(f"residual must be a bool, got {type(residual).__name__}")
    return factor


def _check_parameters(x, mlp, norm, factor, residual) -> str:
    """Check the weights against ``x`` and each other; return their form."""
    channels, patches = x.shape[-1], factor**2
    if channels == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = mlp
    _checks.check_like(fc1_weight, "fc1_weight", x, "x")
    form = mlp_form(fc1_weight, channels, factor)
    if form is None:
        raise ValueError(
            f"fc1_weight must be dense (J, {patches * channels}), block ({patches}, I, {channels}) "
            f"or tied (I, {channels}) for C = {channels} and factor = {factor}, "
            f"got shape {tuple(fc1_weight.shape)}"
        )
    hidden, blocks = fc1_weight.shape[-2], fc1_weight.shape[:-2]
    _checks.check_like(fc2_weight, "fc2_weight", x, "x")
    width = channels if residual or fc2_weight.dim() < 2 else fc2_weight.shape[-2]
    expected = (*blocks, width, hidden)
    if fc2_weight.shape != expected:
        raise ValueError(
            f"fc2_weight must have shape {expected} to follow fc1_weight of shape "
            f"{tuple(fc1_weight.shape)}, got shape {tuple(fc2_weight.shape)}"
        )
    _check_vector(fc1_bias, "fc1_bias", x, (*blocks, hidden))
    _check_vector(fc2_bias, "fc2_bias", x, (width,))
    for name, vector in zip(("norm_weight", "norm_bias"), norm, strict=True):
        # The norm is computed in float32: models in half precision often keep its weights so.
        wide = isinstance(vector, torch.Tensor) and vector.dtype == torch.float32
        like = vector if wide and x.dtype != torch.float64 and vector.device == x.device else x
        _check_vector(vector, name, like, (patches * channels,))
    return form


def _check_vector(vector, name, x, shape) -> None:
    if vector is None:
        return
    _checks.check_like(vector, name, x, "x")
    if vector.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got shape {tuple(vector.shape)}")


# ---- pixel-unshuffle, LayerNorm and the mean of each window, in one pass ------------------------


def unshuffle_norm(
    x: torch.Tensor,
    where: Windows,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    factor: int,
    residual: bool,
    direct: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``z (M, f²C)``, normalised over each window, and the window means ``(M, C)``.

    The arguments are checked already; ``x`` is packed. The statistics and the arithmetic are in
    float32, float64 for float64. The means are empty unless ``residual``. ``direct``: the call is
    one that may take the operator's ``eager`` form.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = _in_dtype(norm_weight, wide), _in_dtype(norm_bias, wide)
    operator = _native.operators._unshuffle_norm
    z, mean, _, _ = (operator.eager if direct else operator)(
        x, where.views, where.all_windows, weight, bias, float(eps), factor, residual
    )
    return z, mean


def _in_dtype(vector: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A contiguous vector in this dtype: itself, nearly always."""
    if vector is None or (vector.dtype == dtype and vector.is_contiguous()):
        return vector
    return vector.to(dtype).contiguous()


def _norm_fake(x, views, num_windows, norm_weight, norm_bias, eps, factor, residual):
    channels = x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((num_windows, factor * factor * channels)),
        x.new_empty((num_windows if residual else 0, channels)),
        x.new_empty((num_windows,), dtype=wide),
        x.new_empty((num_windows,), dtype=wide),
    )


def _norm_backward_fake(grad_z, grad_residual, x, views, norm_weight, mean, rstd, factor, affine):
    channels = grad_z.shape[1] if affine else 0
    grad_norm = (mean.new_empty((channels,)) for _ in range(2))
    return x.new_empty(x.shape), *grad_norm


def _norm_setup_context(ctx, inputs, output):
    x, views, _, norm_weight, norm_bias, _, ctx.factor, ctx.residual = inputs
    _, _, mean, rstd = output
    ctx.affine = norm_weight is not None, norm_bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, views, norm_weight, mean, rstd)


def _norm_backward(ctx, grad_z, grad_residual, *_):
    x, views, norm_weight, mean, rstd = ctx.saved_tensors
    grad_x, *grad_norm = _native.operators._unshuffle_norm_backward(
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


# ---- a linear layer, its activation, and the mean over groups of rows ---------------------------


def linear_activation(
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    group: int = 1,
    direct: bool = False,
) -> torch.Tensor:
    """Return ``activation(z weightᵀ + bias)``, averaged over each ``group`` of consecutive rows.

    Args:
        z: ``(R, I)``; the rows may lie apart, so that a slice of columns needs no copy.
        weight: ``(O, I)``.
        bias: ``(O,)`` or None.
        activation: Name of the activation.
        group: Rows to average; divides R.
        direct: Whether the call may take the operator's ``eager`` form.

    Returns:
        ``(R / group, O)``. Bias, activation and mean are computed in float32 (float64 for float64)
        from the products in the dtype of ``z``, and rounded once. Where cuBLASLt is
        enabled, the products need not have been rounded before.
    """
    bias = None if bias is None else _in_dtype(bias, bias.dtype)
    # The products are kept for the backward pass only: without it no (R, O) tensor is made.
    differentiated = torch.is_grad_enabled() and (
        z.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    operator = _native.operators._linear_activation
    hidden, _ = (operator.eager if direct else operator)(
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


def _layer_fake(z, weight, bias, activation, group, save_products, fused):
    rows, width = z.shape[0], weight.shape[0]
    return z.new_empty((rows // group, width)), z.new_empty((rows if save_products else 0, width))


def _layer_backward_fake(grad_h, u, bias, activation, group, grad_bias):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty((u.shape[1] if grad_bias else 0,), dtype=wide)


def _layer_setup_context(ctx, inputs, output):
    z, weight, bias, ctx.activation, ctx.group, ctx.saved_products, fused = inputs
    ctx.bias_in_products = fused and ctx.saved_products
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z, weight, bias, output[1])


def _layer_backward(ctx, grad_h, _):
    z, weight, bias, u = ctx.saved_tensors
    if not ctx.saved_products:
        u = z @ weight.mT
    shift = None if ctx.bias_in_products else bias
    needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_u, grad_bias = _native.operators._linear_activation_backward(
        grad_h, u, shift, ctx.activation, ctx.group, needs_bias
    )
    grad_z = grad_u @ weight if needs_z else None
    grad_weight = grad_u.mT @ z if needs_weight else None
    grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
    return grad_z, grad_weight, grad_bias, None, None, None, None


# ---- both operators in one node: a second one, and that of the view between them, take six
# microseconds of the host. It keeps no more memory: the products are needed first in the backward
# pass, and what is made after them is smaller.


class _Part:
    """What :class:`torch.autograd.Function` gives to one operator, for one of two."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        pass


class _NormAndLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, views, others):
        num_windows, eps, factor, residual, activation, group = others
        of_norm = x, views, num_windows, norm_weight, norm_bias, eps, factor, residual
        normalised = _native.operators._unshuffle_norm.eager(*of_norm)
        z = normalised[0].view(num_windows * group, weight.shape[1])
        of_layer = z, weight, bias, activation, group, True, _fused(z, activation, group)
        products = _native.operators._linear_activation.eager(*of_layer)
        norm, layer = _Part(), _Part()
        _norm_setup_context(norm, of_norm, normalised)
        _layer_setup_context(layer, of_layer, products)
        ctx.save_for_backward(*norm.saved_tensors, *layer.saved_tensors)
        del norm.saved_tensors, layer.saved_tensors
        ctx.parts = vars(norm), vars(layer)
        return products[0], normalised[1]

    @staticmethod
    def backward(ctx, grad_h, grad_mean):
        needs_x, *needs_norm, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        needs_z = needs_x or any(needs_norm)
        norm, layer = _Part(), _Part()
        for part, options in zip((norm, layer), ctx.parts, strict=True):
            vars(part).update(options)
        saved = ctx.saved_tensors  # asked for once: gradient checkpointing allows no more
        norm.saved_tensors, layer.saved_tensors = saved[:5], saved[5:]
        layer.needs_input_grad = needs_z, needs_weight, needs_bias
        grad_z, grad_weight, grad_bias, *_ = _layer_backward(layer, grad_h, None)
        if not needs_z:
            return None, None, None, grad_weight, grad_bias, None, None
        windows = norm.saved_tensors[3].shape[0]  # a mean for each
        grad_z = grad_z.view(windows, layer.group * grad_z.shape[1])
        grad_x, _, _, *grad_norm = _norm_backward(norm, grad_z, grad_mean)
        return grad_x, *grad_norm[:2], grad_weight, grad_bias, None, None


def _differentiated(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _norm_and_layer(
    x, where, norm_weight, norm_bias, eps, factor, residual, weight, bias, activation, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`linear_activation` of the rows of :func:`unshuffle_norm`, and the window means."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = _in_dtype(norm_weight, wide), _in_dtype(norm_bias, wide)
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    others = where.all_windows, float(eps), factor, residual, activation, group
    return _NormAndLayer.apply(x, *norm, weight, bias, where.views, others)


_native.register(
    "_unshuffle_norm",
    _norm_fake,
    _norm_backward_fake,
    _norm_backward,
    _norm_setup_context,
    public="pixel_unshuffle_mlp",
)


def _layer_rules(z, weight, bias, activation, group, *_):
    """By outputs, as the first layer of a pair is; or by rows where each stands alone."""
    by_outputs = {"weight": 0, "bias": 0}, [1, 1]
    return [by_outputs, ({"z": 0}, [0, 0])] if group == 1 else [by_outputs]


def _layer_backward_rules(grad_h, u, bias, activation, group, *_):
    by_outputs = {"grad_h": 1, "u": 1, "bias": 0}, [1, 0]
    by_rows = {"grad_h": 0, "u": 0}, [0, "sum"]
    return [by_outputs, by_rows] if group == 1 else [by_outputs]


_native.register(
    "_linear_activation",
    _layer_fake,
    _layer_backward_fake,
    _layer_backward,
    _layer_setup_context,
    public="pixel_unshuffle_mlp",
    sharding=(_layer_rules, _layer_backward_rules),
)
