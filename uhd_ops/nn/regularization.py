# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth of whole views, and attention on gathered windows.

The operators have neither dropout nor a bias on the scores. Where a host has them, attention takes
the path below, which gathers the windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.grids import Grids, PackedGrids, pairs_of
from uhd_ops.reference._windows import slots_of_tokens, window_tokens


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
    counts = torch.tensor(lengths, dtype=torch.int64, device=branch.device)
    return branch * keep.repeat_interleave(counts, 0, output_size=branch.shape[0])


def drop_views(
    branch: torch.Tensor, probability: float, grids: Grids, factor: int = 1
) -> torch.Tensor:
    """Drop the branch of whole views, whose tokens lie on the grids merged by ``factor``."""
    if branch.dim() == 3:
        return drop_path(branch, probability)
    lengths = [h * w for h, w in PackedGrids.of(grids).merged(factor)]
    return drop_path(branch, probability, lengths)


def gathered_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: Grids,
    window: int,
    *,
    scale: float | None = None,
    score_bias: nn.Module | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """``window_attention`` on gathered windows, with a bias on the scores and dropout of weights.

    Args:
        q: Queries ``(N, H, D)``, or ``(B, h*w, H, D)`` with one grid; keys and values likewise.
        k: Keys.
        v: Values.
        grids: Grids of the tokens.
        window: Side of a window.
        scale: Factor on the scores; None means ``D ** -0.5``.
        score_bias: A :class:`uhd_ops.nn.score_bias.ScoreBias`, or None.
        dropout: Probability of dropping an attention weight.
    """
    views, batch = pairs_of(grids), q.shape[0] if q.dim() == 4 else 1
    rows, present = window_tokens(views, window, q.device)
    tokens = [x if x.dim() == 4 else x[None] for x in (q, k, v)]
    slots = [x[:, rows].flatten(0, 1).transpose(1, 2) for x in tokens]  # (B * M, H, f², D)
    # A ragged window attends among its own tokens.
    mask = present.repeat(batch, 1)[:, None, None, :]
    if score_bias is not None:
        mask = score_bias(slots[0]).masked_fill(~mask, -torch.inf)
    out = functional.scaled_dot_product_attention(
        *slots, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    out = out.transpose(1, 2).reshape(batch, present.numel(), *q.shape[-2:])
    return out[:, slots_of_tokens(views, window, q.device)].reshape(q.shape)
