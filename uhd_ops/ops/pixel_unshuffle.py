# SPDX-License-Identifier: Apache-2.0
"""The tokens of each window side by side in one merged token."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference, windows
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids
from uhd_ops.windows import TokenOrder


def pixel_unshuffle(
    x: torch.Tensor, grids: Grids, factor: int = 2, *, order_in: TokenOrder = "raster"
) -> torch.Tensor:
    """Concatenate the channels of the ``factor x factor`` tokens of each window.

    Channels are in patch-major order: the tokens of the window in raster order, the C channels of
    each side by side. (:func:`torch.nn.functional.pixel_unshuffle` has them channel-major.) A
    ragged window, at the right or bottom edge of a view whose side is not a multiple of ``factor``,
    repeats the nearest token that it holds; the backward pass adds up the gradients of the slots
    that a token fills. Nothing is computed in the forward pass, so the result has the dtype of
    ``x`` under autocast too. No copy of a packed ``x`` is made as long as its last dimension is
    contiguous.

    Args:
        x: Tokens ``(N, C)`` of packed views, or ``(B, h*w, C)`` with one ``(h, w)`` grid. float32,
            float64, bfloat16 or float16; gradients of half types add up in float32 and round once,
            at the store.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        factor: Side f of a window, in tokens.
        order_in: Order of the tokens inside each view: ``"raster"``, ``"window"`` for window-major,
            ``"block"`` for 2 x 2 blocks one after the other, or sides of nested blocks; see
            :func:`uhd_ops.reorder_tokens`. Window-major tokens are read where they are; in other
            orders but raster order they are copied into raster order first.

    Returns:
        Merged tokens ``(M, f*f*C)``, or ``(B, M / B, f*f*C)`` for batched ``x``, contiguous, in
        raster order on the grids ``PackedGrids(grids).merged(factor)``.

    Raises:
        TypeError: ``x``, ``grids`` or ``factor`` has the wrong type, or ``x`` none of the four
            dtypes.
        ValueError: Shape and grids do not fit, ``factor < 1``, or ``order_in`` is not a token
            order.

    Source:
        LLaVA-UHD v4, section 3.2: the pixel-unshuffle of the intra-ViT compressor.

    Example:
        >>> pixel_unshuffle(torch.arange(6.0)[:, None], (2, 3))
        tensor([[0., 1., 3., 4.],
                [2., 2., 5., 5.]])
    """
    (where, sides), rest = _check((x,), grids, (factor, order_in))
    if rest is not None:
        return _native.operators.pixel_unshuffle.eager(x, *rest)
    if not _native.has_kernels(x.device):
        return reference.pixel_unshuffle(x, grids, factor, order_in=order_in)
    x, where = windows.arrange(where.pack(x), where, sides)
    out = _native.operators.pixel_unshuffle(x, where.views, where.window, where.all_windows)
    return where.unpack_windows(out)


@checked_once
def _check(x, grids, factor, order_in) -> Checked:
    _checks.check_tensor(x, "x")
    factor = _checks.check_positive_int(factor, "factor")
    sides = windows.check_order(order_in, "order_in", factor)
    where = windows.locate(x, "x", grids, factor, ("C",))
    return (where, sides), where.direct(x) if not sides else None


def _fake(x, views, factor, num_windows):
    return x.new_empty((num_windows, factor * factor * x.shape[1]))


def _backward_fake(grad_out, views, factor, num_tokens):
    return grad_out.new_empty((num_tokens, grad_out.shape[1] // (factor * factor)))


# A rank's channels would not lie side by side in the result, where those of a token do.
_SHARDING = [({"x": "sum"}, ["sum"])], [({"grad_out": "sum"}, ["sum"])]
_native.register_linear("pixel_unshuffle", _fake, _backward_fake, _SHARDING)
