# SPDX-License-Identifier: Apache-2.0
"""Attention branches of a compressor: copies of a host's parts, run in windows."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import Grids
from uhd_ops.nn.attention import QueryScope, WindowScope, run_attention, run_own_attention
from uhd_ops.nn.block_spec import AttentionSpec, OwnAttentionSpec
from uhd_ops.nn.layers import clone_module
from uhd_ops.nn.positions import Rotary


class WindowAttention(nn.Module):
    """``post(proj(attention(norm(x))))`` inside each window, with copies of the host's parts.

    Args:
        spec: The branch whose parts are copied.
        window: Side f of a window, in tokens.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid; the result likewise.
    """

    def __init__(self, spec: AttentionSpec, window: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window = spec.num_heads, spec.head_dim, window
        self.scale, self.rotate_half = spec.scale, spec.rotate_half
        self.attention_dropout, self.proj_dropout = spec.attention_dropout, spec.proj_dropout
        self.drop_path = spec.drop_path
        self.norm = clone_module(spec.norm)
        self.fused = len(spec.projections) == 1
        names = ("qkv",) if self.fused else ("q_proj", "k_proj", "v_proj")
        for name, projection in zip(names, spec.projections, strict=True):
            self.add_module(name, clone_module(projection))
        self.q_norm, self.k_norm = clone_module(spec.q_norm), clone_module(spec.k_norm)
        self.v_norm = clone_module(spec.v_norm)
        self.score_bias = None if spec.score_bias is None else spec.score_bias(window)
        self.inner_norm = clone_module(spec.inner_norm)
        self.gate = None if spec.gate is None else clone_module(spec.gate)
        self.proj = clone_module(spec.proj)
        self.post = clone_module(spec.post)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """As for AttentionSpec."""
        return (self.qkv,) if self.fused else (self.q_proj, self.k_proj, self.v_proj)

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return what the branch adds to ``x``."""
        scope = WindowScope(grids, self.window, self.score_bias)
        return run_attention(self, x, scope, positions, training=self.training)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"window={self.window}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class CrossAttention(WindowAttention):
    """Merge each window into its top-left token, or its mean, plus attention to the window.

    Queries, keys and values are projected for every token. The query of a window is that of its
    top-left token or the mean over its tokens, which for a linear projection is the query of their
    mean.

    Args:
        spec: The attention branch whose parts are copied.
        window: Side f of a window, in tokens.
        query: ``"cross_top_left"`` or ``"cross_mean"``.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid.
        Result: merged tokens ``(M, C)``, or ``(B, M / B, C)``.

    Source:
        LLaVA-UHD v4, Tables 4 and A3: the cross-attention variants.
    """

    def __init__(self, spec: AttentionSpec | OwnAttentionSpec, window: int, query: str) -> None:
        if not isinstance(spec, AttentionSpec) or spec.score_bias is not None:
            raise NotImplementedError(
                f'attention="{query}" needs attention by scores of queries and keys without a '
                "bias table; this block's is another"
            )
        super().__init__(spec, window)
        self.query = query

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return merged tokens."""
        if positions is not None and self.query == "cross_mean":
            raise NotImplementedError(
                'attention="cross_mean" has no rotary position for its query; use "cross_top_left"'
            )
        scope = QueryScope(grids, self.window, self.query, x)
        return scope.pick(x) + run_attention(self, x, scope, positions, training=self.training)


class OwnWindowAttention(nn.Module):
    """``post(module(norm(x)))`` inside each window, with a copy of the host's attention module.

    Windows of one shape, of which a view has at most four, run as one batch, so a ragged window is
    a shorter sequence and needs no mask.

    Args:
        spec: The branch whose parts are copied.
        window: Side of a window, in tokens.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid; the result likewise.
    """

    def __init__(self, spec: OwnAttentionSpec, window: int) -> None:
        super().__init__()
        self.window, self.drop_path = window, spec.drop_path
        self.norm = clone_module(spec.norm)
        self.module = clone_module(spec.module)
        self.post = clone_module(spec.post)

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Return what the branch adds to ``x``; ``positions`` must be None."""
        scope = WindowScope(grids, self.window)
        return run_own_attention(self, x, scope, positions, training=self.training)

    def extra_repr(self) -> str:
        """Show the side of a window."""
        return f"window={self.window}"
