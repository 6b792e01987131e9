# SPDX-License-Identifier: Apache-2.0
"""Attention inside non-overlapping windows of packed views."""

from __future__ import annotations

import torch

from uhd_ops import _native, reference
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.ops import _arguments as arguments
from uhd_ops.ops import _window_major
from uhd_ops.ops._derivatives import refuse_second_derivative


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    scale: float | None = None,
    order: str = "raster",
) -> torch.Tensor:
    """Attend inside each window only: ``softmax(scale * q kᵀ) v`` over the tokens of the window.

    The tokens of a view are grouped into non-overlapping ``window x window`` windows. At the right
    and bottom edge of a view whose side is not a multiple of ``window``, a window holds fewer
    tokens and attends among those. A window's result depends on its own tokens only, bit for bit.
    No copy of q, k or v is made as long as their last dimension is contiguous and, on CUDA, their
    rows are 16-byte aligned, so the slices of a packed ``(N, 3, H, D)`` projection can be passed as
    they are.

    On CUDA, half types in windows larger than 16 go to torch's ``scaled_dot_product_attention``
    instead, window by window: it copies the tokens into that order and back, and what it promises
    about determinism is what holds then. Under torch.compile, and with PaddedGrids, they do not.

    Args:
        q: Queries ``(N, H, D)`` for packed tokens, or ``(B, h*w, H, D)`` with one ``(h, w)`` grid.
            float32, float64, bfloat16 or float16; half types accumulate in float32 and round once,
            at the store. Under autocast, q, k and v are cast to the autocast dtype.
        k: Keys, like ``q``.
        v: Values, like ``q``.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        window: Side of a window, in tokens.
        scale: Factor on the scores; None means ``D ** -0.5``.
        order: Order of the output tokens: ``"raster"`` like the input, or ``"window"``: views in
            order, windows of a view in raster order, tokens of a window in raster order.

    Returns:
        Tensor with the shape and dtype of ``q``, contiguous.

    Raises:
        TypeError: A tensor has another dtype than ``q`` or none of the four, or an argument has the
            wrong type.
        ValueError: Shapes, devices or grids do not fit, ``window < 1``, ``scale`` is not finite, or
            ``order`` is neither ``"raster"`` nor ``"window"``.

    Source:
        LLaVA-UHD v4, section 3.2: the window attention of the intra-ViT compressor.

    Example:
        >>> qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8)
        >>> window_attention(*qkv.unbind(1), [(4, 6), (3, 5)]).shape
        torch.Size([39, 2, 8])
    """
    arguments.check_tensor(q, "q")
    for name, x in (("k", k), ("v", v)):
        arguments.check_like(x, name, q, "q")
        arguments.check_same_shape(x, name, q, "q")
    arguments.check_positive_int(window, "window")
    if order not in ("raster", "window"):
        raise ValueError(f'order must be "raster" or "window", got {order!r}')
    layout = arguments.layout_of(q, "q", grids, window, ("H", "D"))
    if scale is None:
        scale = (q.shape[-1] or 1) ** -0.5
    scale = arguments.check_finite(scale, "scale")
    q, k, v = arguments.autocast(q, k, v)
    if not _native.has_kernels(q.device):
        return reference.window_attention(q, k, v, grids, window, scale=scale, order=order)
    q, k, v = layout.pack(q), layout.pack(k), layout.pack(v)
    if _window_major.suits(q, window) and not (layout.padded or arguments.is_tracing(q)):
        every = PackedGrids.of(grids, 1 if layout.batch is None else layout.batch)
        return layout.unpack_tokens(_window_major.attend(q, k, v, every, window, scale, order))
    out = torch.ops.uhd_ops.window_attention(
        q,
        k,
        v,
        layout.views,
        window,
        layout.num_windows,
        scale,
        order == "window",
    )
    return layout.unpack_tokens(out)


def _fake(q, k, v, views, window, num_windows, scale, window_order):
    return q.new_empty(q.shape)


def _backward_fake(grad_out, q, k, v, views, window, num_windows, scale, window_order):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, views, ctx.window, ctx.num_windows, ctx.scale, ctx.window_order = inputs
    ctx.save_for_backward(q, k, v, views)


def _backward(ctx, grad_out):
    q, k, v, views = ctx.saved_tensors
    grad_q, grad_k, grad_v = torch.ops.uhd_ops._window_attention_backward(
        grad_out, q, k, v, views, ctx.window, ctx.num_windows, ctx.scale, ctx.window_order
    )
    return grad_q, grad_k, grad_v, None, None, None, None, None


if _native.status["cpu"] == "loaded":
    torch.library.register_fake("uhd_ops::window_attention", _fake)
    torch.library.register_fake("uhd_ops::_window_attention_backward", _backward_fake)
    torch.library.register_autograd(
        "uhd_ops::window_attention", _backward, setup_context=_setup_context
    )
    refuse_second_derivative("window_attention")
