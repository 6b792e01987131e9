# SPDX-License-Identifier: Apache-2.0
"""Attention inside non-overlapping windows of packed views."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference, windows
from uhd_ops.grids import Grids
from uhd_ops.ops.view_attention import attend_by_length
from uhd_ops.windows import Permute, TokenOrder, Windows


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    scale: float | None = None,
    order: TokenOrder = "raster",
    order_in: TokenOrder = "raster",
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
        order: Order of the output tokens inside each view, whatever that of the input:
            ``"raster"``, ``"window"`` for window-major, ``"block"`` for 2 x 2 blocks one after the
            other, or sides of nested blocks; see :func:`uhd_ops.reorder_tokens`.
        order_in: Order of the tokens of q, k and v, likewise. Tokens that lie window by window,
            whatever the order inside a window, are read where they are; in other orders but raster
            order they are copied into raster order first.

    Returns:
        Tensor with the shape and dtype of ``q``, contiguous.

    Raises:
        TypeError: A tensor has another dtype than ``q`` or none of the four, or an argument has the
            wrong type.
        ValueError: Shapes, devices or grids do not fit, ``window < 1``, ``scale`` is not finite, or
            ``order`` or ``order_in`` is no token order.

    Source:
        LLaVA-UHD v4, section 3.2: the window attention of the intra-ViT compressor.

    Example:
        >>> qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8)
        >>> window_attention(*qkv.unbind(1), [(4, 6), (3, 5)]).shape
        torch.Size([39, 2, 8])
    """
    _checks.check_tensor(q, "q")
    for name, x in (("k", k), ("v", v)):
        _checks.check_like(x, name, q, "q")
        _checks.check_same_shape(x, name, q, "q")
    window = _checks.check_positive_int(window, "window")
    sides_in = windows.check_order(order_in, "order_in", window)
    sides = windows.check_order(order, "order", window)
    where = windows.locate(q, "q", grids, window, ("H", "D"))
    if scale is None:
        scale = (q.shape[-1] or 1) ** -0.5
    scale = _checks.check_finite(scale, "scale")
    q, k, v = _checks.autocast(q, k, v)
    if not _native.has_kernels(q.device):
        return reference.window_attention(
            q, k, v, grids, window, scale=scale, order=order, order_in=order_in
        )
    q, k, v = where.pack(q), where.pack(k), where.pack(v)
    out, sides_out = _attend(q, k, v, where, scale, sides_in, sides)
    if sides_out != sides:
        out = windows.reorder(out, where, sides_out, sides)
    return where.unpack_tokens(out)


def _attend(q, k, v, where, scale, sides_in, sides) -> tuple[torch.Tensor, tuple]:
    """Return the result, and the order it is in: ``sides`` where it costs nothing."""
    window, window_order = where.window, sides == (where.window,)
    on_torch = suits_torch(q, window) and where.keeps
    sides_out = sides if window_order else ()
    if sides_in[:1] == (window,) and not on_torch:  # the order inside a window does not matter
        views, window_order, sides_out = where.window_major().views, False, sides_in
    else:
        views = where.views
        if sides_in:
            q, k, v = (windows.reorder(x, where, sides_in, ()) for x in (q, k, v))
    if on_torch:
        return _attend_on_torch(q, k, v, where, scale, window_order), sides_out
    out = torch.ops.uhd_ops.window_attention(
        q, k, v, views, window, where.all_windows, scale, window_order
    )
    return out, sides_out


# The largest window that our kernels on tensor cores hold.
_LARGEST_OWN = 16


def suits_torch(q: torch.Tensor, window: int) -> bool:
    """Whether torch's kernels for whole sequences are the ones to use.

    The sides of the views have no say: what is computed for one must not depend on the others.
    """
    halves = (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and q.dtype in halves and window > _LARGEST_OWN


def _attend_on_torch(q, k, v, where: Windows, scale: float, window_order: bool) -> torch.Tensor:
    """Attend inside windows of tokens that are gathered first, windows of equal size together.

    torch's kernels take sequences of one length that lie in one piece.
    """
    lengths, grouped, raster, window_major = where.by_length()
    q, k, v = (Permute.apply(x, *grouped) for x in (q, k, v))
    out = attend_by_length(q, k, v, lengths, scale)
    return Permute.apply(out, *(window_major if window_order else raster))


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


_native.register("window_attention", _fake, _backward_fake, _backward, _setup_context)
