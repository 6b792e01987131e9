# SPDX-License-Identifier: Apache-2.0
"""Calls that several operators must refuse, with the exact messages.

They spoil the call that ``OpSpec.make`` gives for float32 tensors on the grids (4, 6) and (3, 5):
39 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specs._spec import BadInput, Call


def bad(errors: Mapping[str, tuple], error: type[Exception] = ValueError) -> tuple[BadInput, ...]:
    """Spoil one argument each: ``{message: (position or name, change)}``.

    ``change`` gets the good value. The message is the label, too.
    """
    return tuple(
        BadInput(
            message,
            lambda call, key=key, change=change: call.put(key, change(call.get(key))),
            error,
            message,
        )
        for message, (key, change) in errors.items()
    )


def bad_tensor(name: str) -> tuple[BadInput, ...]:
    """Spoil the first argument, a tensor called ``name``, whatever its shape."""
    dtypes = "float32, float64, bfloat16 or float16"
    errors = {
        f"{name} must be a torch.Tensor, got list": (0, torch.Tensor.tolist),
        f"{name} must be {dtypes}, got torch.int64": (0, torch.Tensor.long),
    }
    return bad(errors, TypeError)


def bad_count(name: str) -> tuple[BadInput, ...]:
    """Spoil an argument that must be an int of at least 1."""
    types = {
        f"{name} must be an int, got float": (name, lambda _: 2.0),
        f"{name} must be an int, got bool": (name, lambda _: True),
    }
    return bad({f"{name} must be at least 1, got 0": (name, lambda _: 0)}) + bad(types, TypeError)


def too_many_tokens(name: str, grids: int, axes: str, shape: str) -> tuple[BadInput, ...]:
    """Add a view to the argument at position ``grids``."""
    message = f"{name} must be ({axes}) with N = 40 tokens (sum of h*w over grids), got shape"
    return bad({f"{message} {shape}": (grids, lambda pairs: [*pairs, (1, 1)])})


def bad_tokens(grids: int = 1) -> tuple[BadInput, ...]:
    """Spoil ``x`` of shape ``(39, 8)``, or the grids at their position."""
    forms = "x must be (N, C), or (B, h*w, C) with one (h, w) grid, got shape (39,)"
    batched = "x of shape (1, 39, 8) is batched, so grids must be one (h, w) pair; "
    batched += "pack the views into (N, C) for several grids"
    return (
        *bad_tensor("x"),
        *bad({forms: (0, lambda x: x[:, 0]), batched: (0, lambda x: x[None])}),
        *too_many_tokens("x", grids, "N, C", "(39, 8)"),
    )


def bad_attention(like: str = "q") -> tuple[BadInput, ...]:
    """Spoil ``(q, k, v, grids)`` of ``(39, 2, 8)``, where v has the shape of the one named."""
    dtype = "k must have the dtype of q, torch.float32, got torch.float64"
    shape = f"v must have the shape of {like}, (39, 2, 8), got (39, 2, 7)"
    return (
        *bad_tensor("q"),
        *bad({dtype: (1, torch.Tensor.double)}, TypeError),
        *bad({shape: (2, lambda v: v[..., :-1])}),
        BadInput(
            "dimensions",
            lambda call: Call((*(x.flatten(1) for x in call.args[:3]), call.args[3]), call.kwargs),
            ValueError,
            "q must be (N, H, D), or (B, h*w, H, D) with one (h, w) grid, got shape (39, 16)",
        ),
        *too_many_tokens("q", 3, "N, H, D", "(39, 2, 8)"),
    )


def bad_order(name: str, with_window: bool = True) -> tuple[BadInput, ...]:
    """Spoil an argument that must be a token order."""
    names = '"raster", "block"' + ', "window"' * with_window
    known = f"{name} must be {names} or sides of nested blocks such as (8, 2), got "
    nested = (
        f"{name} must name blocks from the outermost to the innermost, each smaller than the one "
        "around it, got (2, 8)"
    )
    values = {
        f"{known}'rows'": (name, lambda _: "rows"),
        nested: (name, lambda _: (2, 8)),
        f"every side in {name} must be at least 1, got 0": (name, lambda _: (4, 0)),
    }
    return bad(values) + bad({f"{known}int": (name, lambda _: 2)}, TypeError)
