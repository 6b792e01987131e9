# SPDX-License-Identifier: Apache-2.0
"""The mean of the tokens that each window holds, weighted by a softmax of their logits."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference, windows
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids
from uhd_ops.windows import TokenOrder


def window_pool(
    x: torch.Tensor,
    logits: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    order_in: TokenOrder = "raster",
) -> torch.Tensor:
    """Pool the tokens of each window, each channel with weights of its own.

    With the tokens ``i`` of a window, for each channel c::

        y[c] = sum_i a_i[c] * x_i[c],    a[c] = softmax over i of logits_i[c]

    A ragged window, at the right or bottom edge of a view whose side is not a multiple of
    ``window``, is pooled over the tokens that it holds. Equal logits give
    :func:`uhd_ops.window_mean`, with the kernels bit for bit. The backward pass computes the
    weights again; nothing but the arguments is kept for it. The result has the dtype of ``x`` under
    autocast too, where logits of another dtype are cast to it. No copy of packed tensors is made as
    long as their last dimension is contiguous.

    Args:
        x: Tokens ``(N, C)`` of packed views, or ``(B, h*w, C)`` with one ``(h, w)`` grid. float32,
            float64, bfloat16 or float16; half types are computed in float32 and round once, at the
            store.
        logits: Logits of the weights, with the shape and dtype of ``x``. -inf gives a token no
            weight; where all are -inf, or one is NaN or +inf, the result is NaN.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        window: Side of a window, in tokens.
        order_in: Order of the tokens inside each view, as for :func:`uhd_ops.pixel_unshuffle`.

    Returns:
        Pooled tokens ``(M, C)``, or ``(B, M / B, C)`` for batched ``x``, contiguous, in raster
        order on the grids ``PackedGrids(grids).merged(window)``.

    Raises:
        TypeError: ``x``, ``logits``, ``grids`` or ``window`` has the wrong type, the tensors differ
            in dtype, or ``x`` has none of the four dtypes.
        ValueError: Shapes or devices differ, shape and grids do not fit, ``window < 1``, or
            ``order_in`` is not a token order.

    Source:
        LLaVA-UHD v3, windowed token compression with content-adaptive pooling.

    Example:
        >>> logits = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0])
        >>> window_pool(torch.arange(6.0)[:, None], logits[:, None], (2, 3))
        tensor([[2.],
                [5.]])
    """
    (where, sides), rest = _check((x, logits), grids, (window, order_in))
    if rest is not None:
        return _native.operators.window_pool.eager(x, logits, *rest)
    logits = logits.to(x.dtype)
    if not _native.has_kernels(x.device):
        return reference.window_pool(x, logits, grids, window, order_in=order_in)
    x, arranged = windows.arrange(where.pack(x), where, sides)
    logits, _ = windows.arrange(where.pack(logits), where, sides)
    out = _native.operators.window_pool(x, logits, arranged.views, where.window, where.all_windows)
    return where.unpack_windows(out)


@checked_once
def _check(x, logits, grids, window, order_in) -> Checked:
    _checks.check_tensor(x, "x")
    _checks.check_like(logits, "logits", x, "x")
    window = _checks.check_positive_int(window, "window")
    sides = windows.check_order(order_in, "order_in", window)
    where = windows.locate(x, "x", grids, window, ("C",))
    _checks.check_same_shape(logits, "logits", x, "x")
    direct = sides == () and logits.dtype == x.dtype
    return (where, sides), where.direct(x) if direct else None


def _fake(x, logits, views, window, num_windows):
    return x.new_empty((num_windows, x.shape[1]))


def _backward_fake(grad_out, x, logits, views, window):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    x, logits, views, ctx.window, _ = inputs
    ctx.save_for_backward(x, logits, views)


def _backward(ctx, grad_out):
    derivative = _native.operators._window_pool_backward
    grads = derivative(grad_out, *ctx.saved_tensors, ctx.window)
    return *grads, None, None, None


_SHARDING = (
    [({"x": 1, "logits": 1}, [1])],
    [({"grad_out": 1, "x": 1, "logits": 1}, [1, 1])],
)
_native.register(
    "window_pool", _fake, _backward_fake, _backward, _setup_context, sharding=_SHARDING
)
