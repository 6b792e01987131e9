# SPDX-License-Identifier: Apache-2.0
"""The mean of the tokens that each window holds."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference, windows
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids
from uhd_ops.windows import TokenOrder


def window_mean(
    x: torch.Tensor, grids: Grids, window: int = 2, *, order_in: TokenOrder = "raster"
) -> torch.Tensor:
    """Average the tokens of each window.

    A ragged window, at the right or bottom edge of a view whose side is not a multiple of
    ``window``, is averaged over the tokens that it holds. The backward pass gives each of them the
    gradient of the mean divided by their number. The result has the dtype of ``x`` under autocast
    too. No copy of a packed ``x`` is made as long as its last dimension is contiguous.

    Args:
        x: Tokens ``(N, C)`` of packed views, or ``(B, h*w, C)`` with one ``(h, w)`` grid. float32,
            float64, bfloat16 or float16; half types accumulate in float32 and round once, at the
            store.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        window: Side of a window, in tokens.
        order_in: Order of the tokens inside each view, as for :func:`uhd_ops.pixel_unshuffle`.

    Returns:
        Means ``(M, C)``, or ``(B, M / B, C)`` for batched ``x``, contiguous, in raster order on the
        grids ``PackedGrids(grids).merged(window)``.

    Raises:
        TypeError: ``x``, ``grids`` or ``window`` has the wrong type, or ``x`` none of the four
            dtypes.
        ValueError: Shape and grids do not fit, ``window < 1``, or ``order_in`` is not a token
            order.

    Source:
        LLaVA-UHD v4, section 3.2: the residual path around the compressor's MLP.

    Example:
        >>> window_mean(torch.arange(6.0)[:, None], (2, 3))
        tensor([[2.0000],
                [3.5000]])
    """
    (where, sides), rest = _check((x,), grids, (window, order_in))
    if rest is not None:
        return _native.operators.window_mean.eager(x, *rest)
    if not _native.has_kernels(x.device):
        return reference.window_mean(x, grids, window, order_in=order_in)
    x, where = windows.arrange(where.pack(x), where, sides)
    out = _native.operators.window_mean(x, where.views, where.window, where.all_windows)
    return where.unpack_windows(out)


@checked_once
def _check(x, grids, window, order_in) -> Checked:
    _checks.check_tensor(x, "x")
    window = _checks.check_positive_int(window, "window")
    sides = windows.check_order(order_in, "order_in", window)
    where = windows.locate(x, "x", grids, window, ("C",))
    return (where, sides), where.direct(x) if not sides else None


def _fake(x, views, window, num_windows):
    return x.new_empty((num_windows, x.shape[1]))


def _backward_fake(grad_out, views, window, num_tokens):
    return grad_out.new_empty((num_tokens, grad_out.shape[1]))


_SHARDING = (
    [({"x": 1}, [1]), ({"x": "sum"}, ["sum"])],
    [({"grad_out": 1}, [1]), ({"grad_out": "sum"}, ["sum"])],
)
_native.register_linear("window_mean", _fake, _backward_fake, _SHARDING)
