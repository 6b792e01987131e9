# SPDX-License-Identifier: Apache-2.0
"""Formulas by which torch's ``FlopCounterMode`` sees the matrix products in native operators."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from uhd_ops.flops._compressors import window_pairs
from uhd_ops.grids import PackedGrids


def register_formulas() -> None:
    """Make torch's ``FlopCounterMode`` count the operators of this library.

    It counts what it has formulas for. Without this call it misses the attention inside windows and
    the first layer of :func:`uhd_ops.pixel_unshuffle_mlp`, which run in native code; everything
    else is made of torch's operators. Counters made before the call do not know the formulas.
    Calling it again does nothing.

    It is no part of ``import uhd_ops`` because torch's module imports Triton, which takes longer
    than all the rest.

    Example:
        >>> register_formulas()
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> qkv = torch.randn(3, 4 * 6, 2, 8)  # 6 windows of 4 tokens, 2 heads of 8 channels
        >>> with FlopCounterMode(display=False) as counter:
        ...     _ = uhd_ops.window_attention(*qkv, [(4, 6)])
        >>> counter.get_total_flops() == 2 * 2 * 6 * 4 * 4 * 2 * 8
        True
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        # Without the native library there is no such operator, and the definitions are counted.
        operator = getattr(torch.ops.uhd_ops, name, None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)


def _window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    views: torch.Tensor,
    window: int,
    num_windows: int,
    *args: Any,
    out_val: Any = None,
) -> int:
    tokens, heads, head_dim = q.shape
    return 2 * 2 * _pairs(views, tokens, window, num_windows) * heads * head_dim


def _window_attention_backward(grad_out: torch.Tensor, *args: Any, out_val: Any = None) -> int:
    # Scores again, and the gradients of probabilities, queries, keys and values: five products
    # where the forward pass has two.
    return _window_attention(*args) // 2 * 5


def _linear_activation(
    z: torch.Tensor, weight: torch.Tensor, *args: Any, out_val: Any = None
) -> int:
    return 2 * z.shape[0] * weight.numel()


_FORMULAS = {
    "window_attention": _window_attention,
    "_window_attention_backward": _window_attention_backward,
    "_linear_activation": _linear_activation,
}


def _pairs(views: torch.Tensor, tokens: int, window: int, num_windows: int) -> int:
    """Pairs of query and key; ``views`` is the kernels' table, see ``PackedGrids.view_table``."""
    if isinstance(views, FakeTensor) or views.is_meta:  # it holds no numbers
        if tokens != num_windows * window**2:
            raise NotImplementedError(
                f"tensors without data do not tell how the {num_windows} windows share "
                f"{tokens} tokens: use grids with sides divisible by {window}, tensors with data, "
                "or uhd_ops.flops.count_forward"
            )
        return num_windows * window**4
    return window_pairs(PackedGrids.of([row[1:3] for row in views[:-1].tolist()]), window)
