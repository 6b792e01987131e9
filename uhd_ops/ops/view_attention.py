# SPDX-License-Identifier: Apache-2.0
"""Full attention inside each view of a packed sequence, on torch's own kernels."""

from __future__ import annotations

import torch
from torch.nn import functional

from uhd_ops import _checks, windows
from uhd_ops.grids import Grids, pairs_of
from uhd_ops.padded_grids import PaddedGrids


def view_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Attend inside each view only: ``softmax(D ** -0.5 * q kᵀ) v`` over all tokens of the view.

    Views with the same number of tokens share one call of torch's ``scaled_dot_product_attention``,
    whichever backend torch chooses for it; no mask is built and no token is padded. Views of equal
    length that follow each other, such as the slices of one image, are passed without a copy.

    Args:
        q: Queries ``(N, H, D)`` for packed tokens, or ``(B, h*w, H, D)`` with one ``(h, w)`` grid.
            float32, float64, bfloat16 or float16. Under autocast, q, k and v are cast to the
            autocast dtype.
        k: Keys, like ``q``.
        v: Values, like ``q``.
        grids: Grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or one
            pair. Only the number of tokens ``h*w`` matters: a view with class or register tokens
            in front is ``(1, length)``.

    Returns:
        Tensor with the shape and dtype of ``q``.

    Raises:
        TypeError: A tensor has another dtype than ``q`` or none of the four, or an argument has
            the wrong type.
        ValueError: Shapes, devices or grids do not fit.

    Source:
        LLaVA-UHD v4, section 3.1: slices are encoded independently of each other.

    Example:
        >>> qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8)
        >>> view_attention(*qkv.unbind(1), [(4, 6), (3, 5)]).shape
        torch.Size([39, 2, 8])
    """
    _checks.check_tensor(q, "q")
    for name, x in (("k", k), ("v", v)):
        _checks.check_like(x, name, q, "q")
        _checks.check_same_shape(x, name, q, "q")
    if isinstance(grids, PaddedGrids):
        raise NotImplementedError(
            "grids of view_attention must not be PaddedGrids: torch's kernels need the lengths as "
            "Python integers; pass grids.cu_seqlens to a variable-length attention instead"
        )
    where = windows.locate(q, "q", grids, 1, ("H", "D"))
    q, k, v = _checks.autocast(q, k, v)
    if where.batch is not None:
        return _attend(q, k, v)
    return attend_by_length(q, k, v, [height * width for height, width in pairs_of(grids)])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of equally long views, ``(S, L, H, D)`` to ``(S, L, H, D)``."""
    if q.numel() == 0:  # some backends refuse empty tensors
        return q * k * v
    heads_first = (x.transpose(-2, -3) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(-2, -3)


def attend_by_length(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of packed views of these lengths, one call for each distinct length."""
    if not lengths:
        return q * k * v
    runs = _runs(lengths)
    runs_of = {}  # number of tokens of a view -> indices of its runs
    for run, (_, length) in enumerate(runs):
        runs_of.setdefault(length, []).append(run)
    # One split, not a slice for each view: the gradient of a slice is as large as all tokens, so
    # the backward pass would be quadratic in the number of views.
    pieces = [x.split([count * length for count, length in runs]) for x in (q, k, v)]
    out = [None] * len(runs)
    for indices in runs_of.values():
        batch = [_stack([x[i].unflatten(0, runs[i]) for i in indices]) for x in pieces]
        results = _attend(*batch, scale).split([runs[i][0] for i in indices])
        for i, result in zip(indices, results, strict=True):
            out[i] = result.unbind(0)
    return torch.cat([view for run in out for view in run])


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Neighbours of equal length: how many views, and the tokens of each."""
    runs = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def _stack(runs: list[torch.Tensor]) -> torch.Tensor:
    """``(V, L, H, D)`` tensors of equally long views in one; no copy of a single run."""
    return runs[0] if len(runs) == 1 else torch.cat(runs)
