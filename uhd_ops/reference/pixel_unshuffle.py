# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.pixel_unshuffle`."""

from __future__ import annotations

import torch

from uhd_ops.reference._spec import BadInput, Call, OpSpec, random_tensor
from uhd_ops.reference._windows import packed, unpacked, window_tokens


def pixel_unshuffle(x, grids, factor=2):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.pixel_unshuffle`."""
    dtype = x.dtype
    x, pairs, batch = packed(x, grids, 1)
    tokens, _ = window_tokens(pairs, factor, x.device)  # (M, f*f), missing ones repeat the nearest
    # Autograd adds up the gradients of a repeated token in the dtype of what is indexed here.
    wide = x.to(torch.promote_types(dtype, torch.float32))
    return unpacked(wide[tokens].flatten(1).to(dtype), grids, batch, factor)


def _make(grids, dtype, *, channels=8, factor=2, generator=None):
    tokens = sum(h * w for h, w in grids)
    return Call((random_tensor((tokens, channels), dtype, generator), grids), {"factor": factor})


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward copies. Backward adds the gradients of at most k = factor**2 slots: k - 1 additions,
    each off by half an epsilon of at most k times the largest gradient. Gradients are standard
    normal numbers, so the largest sum is not below half the largest gradient (unless there are only
    a few sums, which then have few chances to err).
    """
    slots = call.kwargs["factor"] ** 2
    return slots * (slots - 1)


def _bytes_moved(call: Call) -> int:
    """Read x, write every slot."""
    x, grids = call.args
    slots = window_tokens(grids, call.kwargs["factor"])[0].numel()
    return (x.shape[0] + slots) * x.shape[1] * x.element_size()


def _bad(label, key, change, error, message):
    return BadInput(label, lambda call: call.put(key, change(call.get(key))), error, message)


SPEC = OpSpec(
    name="pixel_unshuffle",
    reference=pixel_unshuffle,
    make=_make,
    options={"channels": (8, 1, 7, 72, 100), "factor": (2, 1, 3, 5)},
    bad_inputs=(
        _bad("x list", 0, lambda x: x.tolist(), TypeError, "x must be a torch.Tensor, got list"),
        _bad(
            "x int",
            0,
            lambda x: x.long(),
            TypeError,
            "x must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        _bad(
            "dimensions",
            0,
            lambda x: x[:, 0],
            ValueError,
            "x must be (N, C), or (B, h*w, C) with one (h, w) grid, got shape (39,)",
        ),
        _bad(
            "too many tokens",
            1,
            lambda grids: [*grids, (1, 1)],
            ValueError,
            "x must be (N, C) with N = 40 tokens (sum of h*w over grids), got shape (39, 8)",
        ),
        _bad(
            "batched, several grids",
            0,
            lambda x: x[None],
            ValueError,
            "x of shape (1, 39, 8) is batched, so grids must be one (h, w) pair; "
            "pack the views into (N, C) for several grids",
        ),
        _bad("factor 0", "factor", lambda _: 0, ValueError, "factor must be at least 1, got 0"),
        _bad("factor 2.0", "factor", lambda _: 2.0, TypeError, "factor must be an int, got float"),
        _bad("factor True", "factor", lambda _: True, TypeError, "factor must be an int, got bool"),
    ),
    roundings=_roundings,
    bytes_moved=_bytes_moved,
    flops=lambda call: 0,
    output="windows",
)
