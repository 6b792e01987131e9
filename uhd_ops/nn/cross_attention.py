# SPDX-License-Identifier: Apache-2.0
"""One query per window that attends to the tokens of its window, with a host's projections."""

from __future__ import annotations

import torch
from torch.nn import functional

from uhd_ops.grids import Grids, pairs_of
from uhd_ops.nn.attention_branch import WindowAttention
from uhd_ops.nn.block_spec import AttentionSpec, OwnAttentionSpec
from uhd_ops.nn.positions import Rotary, rotate
from uhd_ops.nn.regularization import drop_views
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.reference._windows import window_tokens

QUERIES = ("cross_top_left", "cross_mean")


class CrossAttention(WindowAttention):
    """Merge each window into its top-left token, or its mean, plus attention to the window.

    Queries, keys and values are projected for every token. The query of a window is that of its
    top-left token or the mean over its tokens, which for a linear projection is the query of their
    mean.

    Args:
        host: The attention branch whose parts are copied.
        window: Side f of a window, in tokens.
        query: ``"cross_top_left"`` or ``"cross_mean"``.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid.
        Result: merged tokens ``(M, C)``, or ``(B, M / B, C)``.

    Source:
        LLaVA-UHD v4, Tables 4 and A3: the cross-attention variants.
    """

    def __init__(self, host: AttentionSpec | OwnAttentionSpec, window: int, query: str) -> None:
        if not isinstance(host, AttentionSpec) or host.score_bias is not None:
            raise NotImplementedError(
                f'attention="{query}" needs attention by scores of queries and keys without a '
                "bias table; this block's is another"
            )
        super().__init__(host, window)
        self.query = query

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return merged tokens."""
        if positions is not None and self.query == "cross_mean":
            raise NotImplementedError(
                'attention="cross_mean" has no rotary position for its query; use "cross_top_left"'
            )
        tokens = self.norm(x)
        q, k, v = self._project(tokens)
        q, k, v = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), self.v_norm(v).to(v.dtype)
        if positions is not None:
            q, k = (rotate(y, positions, self.rotate_half) for y in (q, k))
        rows, present = window_tokens(pairs_of(grids), self.window, x.device)
        dim = x.dim() - 2  # of the tokens; heads and channels are behind it
        k, v = (y.index_select(dim, rows.flatten()).unflatten(dim, rows.shape) for y in (k, v))
        y = self.inner_norm(self._attend_window(self._pick(q, grids, rows, dim), k, v, present))
        if self.gate is not None:
            y = y * self._pick(self.gate(tokens).sigmoid(), grids, rows, dim)
        branch = self.post(self.proj_drop(self.proj(y)))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids, self.window)
        return self._pick(x, grids, rows, dim) + branch

    def _pick(self, y: torch.Tensor, grids: Grids, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """One row per window: that of its top-left token, or the mean."""
        if self.query == "cross_top_left":
            return y.index_select(dim, rows[:, 0])
        merged = window_mean(y.flatten(dim + 1), grids, self.window)
        return merged.unflatten(-1, y.shape[dim + 1 :])

    def _attend_window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Queries ``(..., M, H, D)`` to keys ``(..., M, f², H, D)``; ``(..., M, H * D)``."""
        groups = self.num_heads // self.num_kv_heads
        k, v = (y.repeat_interleave(groups, -2).transpose(-3, -2) for y in (k, v))
        out = functional.scaled_dot_product_attention(
            q[..., None, :],
            k,
            v,
            attn_mask=present[:, None, None],
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return out.flatten(-3)
