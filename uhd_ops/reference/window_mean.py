# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.window_mean`."""

from __future__ import annotations

import torch

from uhd_ops.reference._spec import BadInput, Call, OpSpec, random_tensor
from uhd_ops.reference._windows import packed, unpacked, window_tokens


def window_mean(x, grids, window=2):
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.window_mean`."""
    x, pairs, batch = packed(x, grids, 1)
    tokens, present = window_tokens(pairs, window, x.device)
    slots = x[tokens].masked_fill(~present[..., None], 0)  # (M, f*f, C)
    total = slots.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = total / present.sum(1, keepdim=True)
    return unpacked(mean.to(x.dtype), grids, batch, window)


def _make(grids, dtype, *, channels=8, window=2, generator=None):
    tokens = sum(h * w for h, w in grids)
    return Call((random_tensor((tokens, channels), dtype, generator), grids), {"window": window})


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    Forward adds k = window**2 tokens: k - 1 additions, each off by half an epsilon of at most k
    times the largest token, and divides by k, another half epsilon; for standard normal tokens the
    largest mean is about 1 / sqrt(k) of the largest token, and half of that is allowed for: (k - 1)
    sqrt(k) + 1 / 2 < k ** 1.5. Backward divides once.
    """
    tokens = call.kwargs["window"] ** 2
    return tokens**1.5


def _bytes_moved(call: Call) -> int:
    """Read x, write the means."""
    x, grids = call.args
    windows = window_tokens(grids, call.kwargs["window"])[0].shape[0]
    return (x.shape[0] + windows) * x.shape[1] * x.element_size()


def _bad(label, key, change, error, message):
    return BadInput(label, lambda call: call.put(key, change(call.get(key))), error, message)


SPEC = OpSpec(
    name="window_mean",
    reference=window_mean,
    make=_make,
    options={"channels": (8, 1, 7, 72, 100), "window": (2, 1, 3, 5)},
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
        _bad("window 0", "window", lambda _: 0, ValueError, "window must be at least 1, got 0"),
        _bad("window 2.0", "window", lambda _: 2.0, TypeError, "window must be an int, got float"),
        _bad("window True", "window", lambda _: True, TypeError, "window must be an int, got bool"),
    ),
    roundings=_roundings,
    bytes_moved=_bytes_moved,
    flops=lambda call: call.args[
        0
    ].numel(),  # one addition per token and channel, the division of each mean aside
    output="windows",
)
