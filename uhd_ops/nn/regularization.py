# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth and dropout inside windows: what only training needs.

The operators have no dropout. Where a probability is above zero, training takes the paths below,
which gather the windows; in evaluation they are never taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.mlp_forms import MlpWeights
from uhd_ops.reference._windows import window_tokens
from uhd_ops.reference.pixel_unshuffle_mlp import ACTIVATIONS, mlp_form


def drop_path(
    branch: torch.Tensor, probability: float, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """Drop the residual branch of whole views at random; scale what is kept by ``1 / (1 - p)``.

    Args:
        branch: ``(B, L, C)``, one view per row of the batch; or packed ``(N, C)`` with ``lengths``.
        probability: Of dropping a view.
        lengths: Tokens of each packed view; None for batched tokens.
    """
    if probability == 0.0:
        return branch
    views = branch.shape[0] if lengths is None else len(lengths)
    keep = branch.new_empty((views, 1)).bernoulli_(1 - probability)
    if probability < 1.0:
        keep = keep / (1 - probability)
    if lengths is None:
        return branch * keep[:, None]
    counts = torch.tensor(lengths, device=branch.device)
    return branch * keep.repeat_interleave(counts, 0, output_size=branch.shape[0])


def window_attention_with_dropout(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Grids, window: int, p: float
) -> torch.Tensor:
    """``window_attention`` with dropout of probability ``p`` on the attention weights."""
    packed, views = _packed(q, 3, grids)
    rows, present = window_tokens(views, window, q.device)
    slots = [x.reshape(packed, *x.shape[-2:])[rows].transpose(1, 2) for x in (q, k, v)]
    mask = present[:, None, None, :]  # (M, 1, 1, f²): a ragged window attends among its own tokens
    out = functional.scaled_dot_product_attention(*slots, attn_mask=mask, dropout_p=p)
    out = out.transpose(1, 2)[present]
    return torch.empty_like(out).index_copy(0, rows[present], out).reshape(q.shape)


def pixel_unshuffle_mlp_with_dropout(
    x: torch.Tensor,
    grids: Grids,
    weights: MlpWeights,
    *,
    norm: torch.nn.LayerNorm,
    factor: int,
    activation: str,
    p: float,
) -> torch.Tensor:
    """``pixel_unshuffle_mlp`` without residual, with dropout of probability ``p`` after fc1."""
    packed, views = _packed(x, 2, grids)
    rows, _ = window_tokens(views, factor, x.device)
    patches, channels = factor**2, x.shape[-1]
    hidden = norm(x.reshape(packed, channels)[rows].flatten(1))  # (M, f²C)
    form = mlp_form(weights.fc1_weight, channels, factor)
    if form == "tied":
        hidden = functional.linear(hidden.unflatten(1, (patches, channels)), *weights[:2])
    elif form == "block":
        hidden = hidden.unflatten(1, (patches, channels))
        hidden = torch.einsum("mpc,pic->mpi", hidden, weights.fc1_weight)
        hidden = hidden if weights.fc1_bias is None else hidden + weights.fc1_bias
    else:
        hidden = functional.linear(hidden, *weights[:2])
    hidden = functional.dropout(ACTIVATIONS[activation](hidden), p)
    if form == "block":
        out = torch.einsum("mpi,pci->mc", hidden, weights.fc2_weight)
        out = out if weights.fc2_bias is None else out + weights.fc2_bias
    else:
        hidden = hidden.mean(1) if form == "tied" else hidden
        out = functional.linear(hidden, *weights[2:])
    return out if x.dim() == 2 else out.unflatten(0, (x.shape[0], -1))


def _packed(x: torch.Tensor, token_dims: int, grids: Grids) -> tuple[int, PackedGrids]:
    """Number of packed tokens, and the grids of all views of a batched or packed ``x``."""
    if x.dim() == token_dims:
        return x.shape[0], PackedGrids.of(grids)
    return x.shape[0] * x.shape[1], PackedGrids.of(grids, x.shape[0])
