# SPDX-License-Identifier: Apache-2.0
"""A row of each window given to all of its tokens: the transpose of adding up a window."""

from __future__ import annotations

import torch

from uhd_ops.ops._token_order import _kept, _rows_of, _window_views
from uhd_ops.reference._windows import slots_of_tokens
from uhd_ops.windows import Layout


class _Spread(torch.autograd.Function):
    """Gather rows. Indexing would scatter the gradient, on CUDA in no fixed order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, window_of_token, counts, views, window):
        return rows.index_select(0, window_of_token)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, counts, views, ctx.window = inputs
        ctx.save_for_backward(counts, views)

    @staticmethod
    def backward(ctx, grad):
        counts, views = ctx.saved_tensors
        means = torch.ops.uhd_ops.window_mean(grad, views, ctx.window, counts.shape[0])
        return (means * counts).to(grad.dtype), None, None, None, None


def spread_windows(rows: torch.Tensor, layout: Layout, window: int, grids) -> torch.Tensor:
    """Return ``(N, C)`` tokens of which each is the row of its window.

    Args:
        rows: One row per window, ``(M, C)``.
        layout: Where the windows are; tokens in raster order.
        window: Side of a window.
        grids: Grids of the layout.
    """
    if layout.views is None:  # no kernels: the plain way
        index = slots_of_tokens(grids, window, rows.device) // window**2
        views = 1 if layout.batch is None else layout.batch
        starts = torch.arange(views, device=rows.device) * layout.windows
        return rows.index_select(0, (starts[:, None] + index).flatten())
    tables = _kept(layout, ("spread", window, rows.device), lambda: _tables(layout, window))
    return _Spread.apply(rows, *tables, layout.views, window)


def _tables(layout: Layout, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the window of each token, ``(N,)`` int64, and the tokens of each, ``(M, 1)`` float."""
    count = layout.tokens if layout.batch is None else layout.tokens * layout.batch
    token = torch.arange(count, device=layout.views.device)
    first, _, width, first_window = _rows_of(layout.views, 0, token)
    columns = width.clamp(min=1)  # no division by zero in the padding
    row, col = (token - first) // columns, (token - first) % columns
    across = (width + window - 1) // window
    index = first_window + row // window * across + col // window
    # Padding takes any row: what is made of it does not count.
    index = torch.where(token < layout.views[-1, 0], index, 0)
    _, height, width, _ = _window_views(layout, window)[: layout.num_windows].unbind(1)
    return index, (height * width)[:, None].float()
