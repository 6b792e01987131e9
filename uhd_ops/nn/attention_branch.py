# SPDX-License-Identifier: Apache-2.0
"""The attention branch of a transformer block, restricted to windows."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import Grids, pairs_of
from uhd_ops.nn.block_spec import AttentionSpec, OwnAttentionSpec
from uhd_ops.nn.layers import clone_module, post_of
from uhd_ops.nn.positions import Rotary, rotate
from uhd_ops.nn.regularization import drop_views, gathered_window_attention
from uhd_ops.ops.window_attention import window_attention
from uhd_ops.reference._windows import windows_by_shape


class WindowAttention(nn.Module):
    """``post(proj(attention(norm(x))))`` inside each window, with copies of the host's parts.

    Args:
        host: The branch whose parts are copied.
        window: Side f of a window, in tokens.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid; the result likewise.
    """

    def __init__(self, host: AttentionSpec, window: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window = host.num_heads, host.head_dim, window
        self.num_kv_heads = host.num_kv_heads or host.num_heads
        self.scale, self.rotate_half = host.scale, host.rotate_half
        self.attention_dropout, self.drop_path = host.attention_dropout, host.drop_path
        self.norm = clone_module(host.norm)
        self.fused = len(host.projections) == 1
        names = ("qkv",) if self.fused else ("q_proj", "k_proj", "v_proj")
        for name, projection in zip(names, host.projections, strict=True):
            self.add_module(name, clone_module(projection))
        self.q_norm, self.k_norm = clone_module(host.q_norm), clone_module(host.k_norm)
        self.v_norm = clone_module(host.v_norm)
        self.score_bias = None if host.score_bias is None else host.score_bias(window)
        self.inner_norm = clone_module(host.inner_norm)
        self.gate = None if host.gate is None else clone_module(host.gate)
        self.proj = clone_module(host.proj)
        self.proj_drop = nn.Dropout(host.proj_dropout)
        self.post = post_of(host.post)

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return what the branch adds to ``x``."""
        x = self.norm(x)
        q, k, v = self._project(x)
        # Under autocast a norm returns float32.
        q, k, v = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), self.v_norm(v).to(v.dtype)
        if positions is not None:
            q, k = (rotate(y, positions, self.rotate_half) for y in (q, k))
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
        y = self.inner_norm(self._attend(q, k, v, grids).flatten(-2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        branch = self.post(self.proj_drop(self.proj(y)))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids)
        return branch

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, each ``(..., heads, head_dim)``."""
        if self.fused:
            return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return tuple(y.unflatten(-1, (-1, self.head_dim)) for y in parts)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Grids
    ) -> torch.Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        if self.score_bias is None and not dropout:
            return window_attention(q, k, v, grids, self.window, scale=self.scale)
        return gathered_window_attention(
            q,
            k,
            v,
            grids,
            self.window,
            scale=self.scale,
            score_bias=self.score_bias,
            dropout=dropout,
        )

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"window={self.window}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class OwnWindowAttention(nn.Module):
    """``post(module(norm(x)))`` inside each window, with a copy of the host's attention module.

    Windows of one shape, of which a view has at most four, run as one batch, so a ragged window is
    a shorter sequence and needs no mask.

    Args:
        host: The branch whose parts are copied.
        window: Side of a window, in tokens.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid; the result likewise.
    """

    def __init__(self, host: OwnAttentionSpec, window: int) -> None:
        super().__init__()
        self.window, self.drop_path = window, host.drop_path
        self.norm = clone_module(host.norm)
        self.module = clone_module(host.module)
        self.call = host.call
        self.post = post_of(host.post)

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return what the branch adds to ``x``; ``positions`` must be None."""
        if positions is not None:
            raise NotImplementedError(
                f"positions must be None: {type(self.module).__name__} takes no rotary embeddings"
            )
        views = pairs_of(grids)
        tokens, order, parts = self.norm(x), [], []
        tokens = tokens if x.dim() == 3 else tokens[None]
        for shape, rows in windows_by_shape(views, self.window, x.device).items():
            order.append(rows.flatten())
            parts.append(self._attend(tokens[:, rows], shape, _sizes_of(views, rows)))
        if parts:
            tokens = torch.cat(parts, 1)[:, torch.cat(order).argsort()]
        branch = self.post(tokens.reshape(x.shape))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids)
        return branch

    def _attend(
        self, windows: torch.Tensor, shape: tuple[int, int], sizes: torch.Tensor
    ) -> torch.Tensor:
        """``(B, n, height * width, C)`` to ``(B, n * height * width, C)``."""
        batch, windows_each, length, channels = windows.shape
        out = self.call(self.module, windows.flatten(0, 1), shape, sizes.repeat(batch))
        return out.reshape(batch, windows_each * length, channels)

    def extra_repr(self) -> str:
        """Show the side of a window."""
        return f"window={self.window}"


def _sizes_of(views: tuple[tuple[int, int], ...], rows: torch.Tensor) -> torch.Tensor:
    """Number of tokens of the view that each window, a row of packed indices, belongs to."""
    sizes = torch.tensor([h * w for h, w in views], device=rows.device)
    return sizes[torch.searchsorted(sizes.cumsum(0), rows[:, 0].contiguous(), right=True)]


def attention_branch(host: AttentionSpec | OwnAttentionSpec, window: int) -> nn.Module:
    """Make the module for a branch of a host."""
    kind = WindowAttention if isinstance(host, AttentionSpec) else OwnWindowAttention
    return kind(host, window)
