# SPDX-License-Identifier: Apache-2.0
"""Calls that several operators must refuse, with the exact messages.

They spoil the call that ``OpSpec.make`` gives for float32 tensors on the grids (4, 6) and (3, 5):
39 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from specs._spec import BadInput, Call


def bad(
    label: str, key: int | str, change: Callable, error: type[Exception], message: str
) -> BadInput:
    """Spoil one argument by ``change``, which gets the good value."""
    return BadInput(label, lambda call: call.put(key, change(call.get(key))), error, message)


def bad_tensor(name: str) -> tuple[BadInput, ...]:
    """Spoil the first argument, a tensor called ``name``, whatever its shape."""
    dtypes = "float32, float64, bfloat16 or float16"
    return (
        bad("list", 0, torch.Tensor.tolist, TypeError, f"{name} must be a torch.Tensor, got list"),
        bad("int", 0, torch.Tensor.long, TypeError, f"{name} must be {dtypes}, got torch.int64"),
    )


def bad_count(name: str) -> tuple[BadInput, ...]:
    """Spoil an argument that must be an int of at least 1."""
    return (
        bad(f"{name} 0", name, lambda _: 0, ValueError, f"{name} must be at least 1, got 0"),
        bad(f"{name} 2.0", name, lambda _: 2.0, TypeError, f"{name} must be an int, got float"),
        bad(f"{name} True", name, lambda _: True, TypeError, f"{name} must be an int, got bool"),
    )


def bad_tokens() -> tuple[BadInput, ...]:
    """Spoil ``(x, grids)`` where x is ``(39, 8)``."""
    return (
        *bad_tensor("x"),
        bad(
            "dimensions",
            0,
            lambda x: x[:, 0],
            ValueError,
            "x must be (N, C), or (B, h*w, C) with one (h, w) grid, got shape (39,)",
        ),
        bad(
            "too many tokens",
            1,
            lambda grids: [*grids, (1, 1)],
            ValueError,
            "x must be (N, C) with N = 40 tokens (sum of h*w over grids), got shape (39, 8)",
        ),
        bad(
            "batched, several grids",
            0,
            lambda x: x[None],
            ValueError,
            "x of shape (1, 39, 8) is batched, so grids must be one (h, w) pair; "
            "pack the views into (N, C) for several grids",
        ),
    )


def bad_attention() -> tuple[BadInput, ...]:
    """Spoil ``(q, k, v, grids)`` where q, k and v are ``(39, 2, 8)``."""
    return (
        *bad_tensor("q"),
        bad(
            "k dtype",
            1,
            lambda k: k.double(),
            TypeError,
            "k must have the dtype of q, torch.float32, got torch.float64",
        ),
        bad(
            "v shape",
            2,
            lambda v: v[..., :-1],
            ValueError,
            "v must have the shape of q, (39, 2, 8), got (39, 2, 7)",
        ),
        BadInput(
            "dimensions",
            lambda call: Call((*(x.flatten(1) for x in call.args[:3]), call.args[3]), call.kwargs),
            ValueError,
            "q must be (N, H, D), or (B, h*w, H, D) with one (h, w) grid, got shape (39, 16)",
        ),
        bad(
            "too many tokens",
            3,
            lambda grids: [*grids, (1, 1)],
            ValueError,
            "q must be (N, H, D) with N = 40 tokens (sum of h*w over grids), got shape (39, 2, 8)",
        ),
    )


def bad_order(name: str, with_window: bool = True) -> tuple[BadInput, ...]:
    """Spoil an argument that must be a token order."""
    names = '"raster", "block"' + ', "window"' * with_window
    known = f"{name} must be {names} or sides of nested blocks such as (8, 2), got "
    nested = (
        f"{name} must name blocks from the outermost to the innermost, each smaller than the one "
        "around it, got (2, 8)"
    )
    side = f"every side in {name} must be at least 1, got 0"
    return (
        bad(f"{name} rows", name, lambda _: "rows", ValueError, f"{known}'rows'"),
        bad(f"{name} int", name, lambda _: 2, TypeError, f"{known}int"),
        bad(f"{name} inside out", name, lambda _: (2, 8), ValueError, nested),
        bad(f"{name} zero", name, lambda _: (4, 0), ValueError, side),
    )
