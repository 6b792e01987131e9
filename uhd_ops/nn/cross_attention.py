# SPDX-License-Identifier: Apache-2.0
"""One query per window that attends to the tokens of its window, with a host's projections."""

from __future__ import annotations

import torch
from torch.nn import functional

from uhd_ops.grids import Grids
from uhd_ops.nn.attention_branch import WindowAttention
from uhd_ops.nn.host_block import HostAttention, HostOwnAttention
from uhd_ops.nn.positions import Rotary, rotate
from uhd_ops.nn.regularization import drop_views, packed_views
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

    def __init__(self, host: HostAttention | HostOwnAttention, window: int, query: str) -> None:
        if not isinstance(host, HostAttention) or host.score_bias is not None:
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
        packed, views = packed_views(x, 2, grids)
        rows, present = window_tokens(views, self.window, x.device)
        tokens = self.norm(x)
        q, k, v = (y.reshape(packed, *y.shape[-2:]) for y in self._project(tokens))
        q, k, v = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), self.v_norm(v).to(v.dtype)
        if positions is not None:
            shape = (packed, *positions.sin.shape[-2:])
            table = Rotary(*(y.expand(*x.shape[:-1], *shape[1:]).reshape(shape) for y in positions))
            q, k = (rotate(y, table, self.rotate_half) for y in (q, k))
        flat = x.reshape(packed, -1)
        gate = None if self.gate is None else self.gate(tokens).sigmoid().reshape(packed, -1)
        base, q, gate = (None if y is None else self._pick(y, rows, views) for y in (flat, q, gate))
        y = self.inner_norm(self._attend_window(q, k[rows], v[rows], present))
        branch = self.post(self.proj_drop(self.proj(y if gate is None else y * gate)))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, views, self.window)
        merged = base + branch
        return merged if x.dim() == 2 else merged.unflatten(0, (x.shape[0], -1))

    def _pick(self, y: torch.Tensor, rows: torch.Tensor, views: Grids) -> torch.Tensor:
        """One row per window of ``y (N, ...)``: that of its top-left token, or the mean."""
        if self.query == "cross_top_left":
            return y[rows[:, 0]]
        return window_mean(y.flatten(1), views, self.window).unflatten(1, y.shape[1:])

    def _attend_window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Queries ``(M, H, D)`` to the window's keys ``(M, f², H, D)``; returns ``(M, H * D)``."""
        groups = self.num_heads // self.num_kv_heads
        k, v = (y.repeat_interleave(groups, -2).transpose(1, 2) for y in (k, v))
        out = functional.scaled_dot_product_attention(
            q[:, :, None],
            k,
            v,
            attn_mask=present[:, None, None],
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scale,
        )
        return out.flatten(1)
