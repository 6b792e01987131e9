# SPDX-License-Identifier: Apache-2.0
"""The attention branch of a transformer block, and which tokens attend to which.

The branch is written once, :func:`run_attention`, for the live parts of a host and for the copies
in a compressor. What differs is the scope: the windows of a view, one query for each window, or
whole views. A scope attends, runs an attention module of a host on its groups of tokens, and drops
the branches of views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import autocast_dtype, does_nothing
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.positions import Rotary, rotate
from uhd_ops.ops.view_attention import attend_views, by_group
from uhd_ops.ops.window_attention import (
    LARGEST_OWN,
    window_attention,
    window_attention_qkvpacked,
)
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.windows import Windows, locate

Query = Literal["cross_top_left", "cross_mean"]
QUERIES: tuple[Query, ...] = get_args(Query)


def run_attention(
    part: Any,
    x: torch.Tensor,
    scope: Scope,
    positions: Rotary | None = None,
    *,
    training: bool = False,
) -> torch.Tensor:
    """Return what an attention branch adds to ``x``.

    Args:
        part: An :class:`uhd_ops.nn.AttentionSpec`, or a module with the same attributes.
        x: Tokens ``(N, C)`` or ``(B, L, C)``, as the scope has them.
        scope: Which tokens attend to which.
        positions: Rotary embeddings of the tokens, or None.
        training: Whether dropout acts.
    """
    tokens, projections = x if part.norm is None else part.norm(x), part.projections
    dropout = part.attention_dropout if training else 0.0
    options = {"scale": part.scale, "dropout": dropout}
    if positions is not None and scope.rotates(positions, tokens, dropout):
        options["rotary"] = (positions.cos, positions.sin)
        options["rotate_half"] = int(part.rotate_half)
        positions = None
    unnormed = does_nothing(part.q_norm, part.k_norm, part.v_norm)
    if len(projections) == 1 and unnormed and positions is None:
        qkv = projections[0](tokens).unflatten(-1, (3, part.num_heads, part.head_dim))
        y = scope.attend_packed(qkv, **options)
    else:
        q, k, v = _prepared(part, tokens, positions)
        groups = q.shape[-2] // k.shape[-2]
        if groups > 1 and not scope.shares_heads:
            k, v = _repeated(groups, k, v)
        y = scope.attend(q, k, v, **options)
    y = y.flatten(-2)
    if not does_nothing(part.inner_norm):
        y = part.inner_norm(y)
    if part.gate is not None:
        y = y * scope.pick(part.gate(tokens).sigmoid())
    y = part.proj(y)
    if training:
        y = functional.dropout(y, part.proj_dropout)
    return end_branch(part, y, scope, training)


def _prepared(part: Any, x: torch.Tensor, positions: Rotary | None) -> Sequence[torch.Tensor]:
    """Return queries, keys and values as they attend, each ``(..., heads, head_dim)``."""
    if len(part.projections) == 1:
        qkv = part.projections[0](x).unflatten(-1, (3, part.num_heads, part.head_dim))
        q, k, v = qkv.unbind(-3)
    else:
        q, k, v = (layer(x).unflatten(-1, (-1, part.head_dim)) for layer in part.projections)
    dtype = v.dtype  # under autocast a norm returns float32
    if part.joint_norms:
        q, k = q.flatten(-2), k.flatten(-2)
    if part.q_norm is not None:
        q = part.q_norm(q).to(dtype)
    if part.k_norm is not None:
        k = part.k_norm(k).to(dtype)
    if part.joint_norms:
        q, k = q.unflatten(-1, (-1, part.head_dim)), k.unflatten(-1, (-1, part.head_dim))
    if part.v_norm is not None:
        v = part.v_norm(v).to(dtype)
    if positions is not None:
        q, k = (rotate(y, positions, part.rotate_half) for y in (q, k))
    return q, k, v


def _repeated(groups: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Give every head of the queries its own of keys or values ``(..., H, D)``."""
    return [x.repeat_interleave(groups, -2) for x in tensors]


def run_own_attention(
    part: Any,
    x: torch.Tensor,
    scope: Scope,
    positions: Rotary | None = None,
    *,
    training: bool = False,
) -> torch.Tensor:
    """As ``run_attention``, for an :class:`uhd_ops.nn.OwnAttentionSpec`.

    Raises:
        NotImplementedError: ``positions`` are given.
    """
    if positions is not None:
        raise NotImplementedError(
            f"positions must be None: {type(part.module).__name__} takes no rotary embeddings"
        )
    tokens = x if part.norm is None else part.norm(x)
    return end_branch(part, scope.run_module(part.module, tokens), scope, training)


def end_branch(part: Any, y: torch.Tensor, scope: Scope, training: bool) -> torch.Tensor:
    """Apply what follows the last layer of any branch: ``post`` and drop path."""
    post = part.post
    if isinstance(post, torch.Tensor):
        y = y * post
    elif not does_nothing(post):
        y = post(y)
    return scope.drop(y, part.drop_path) if training and part.drop_path else y


class Scope:
    """Which tokens attend to which, and where the views are.

    Attributes:
        shares_heads: Whether several heads of the queries may share one of keys and values.
    """

    shares_heads = False

    def rotates(self, positions: Rotary, tokens: torch.Tensor, dropout: float) -> bool:
        """Whether :meth:`attend` takes rotary tables, as ``rotary`` and ``rotate_half``."""
        return False

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attend from ``q (..., N, H, D)`` to ``k`` and ``v`` of the same shape.

        Args:
            q: Queries.
            k: Keys; where heads are shared, their number divides H.
            v: Values, likewise.
            scale: Factor on the scores; None means ``D ** -0.5``.
            dropout: Probability of dropping an attention weight.
        """
        raise NotImplementedError

    def attend_packed(
        self, qkv: torch.Tensor, *, scale: float | None, dropout: float
    ) -> torch.Tensor:
        """As :meth:`attend`, of queries, keys and values in one tensor ``(..., N, 3, H, D)``."""
        return self.attend(*qkv.unbind(-3), scale=scale, dropout=dropout)

    def run_module(self, module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor):
        """Return ``module(tokens)`` of every group of tokens, ``(groups, length, C)`` at a time."""
        raise NotImplementedError

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of ``x (..., N, C)`` that the results of :meth:`attend` belong to."""
        return x

    def drop(self, branch: torch.Tensor, probability: float) -> torch.Tensor:
        """Drop the residual branch of whole views at random; scale the others."""
        raise NotImplementedError


class WindowScope(Scope):
    """The tokens of a window attend to each other.

    Args:
        grids: Grids of packed tokens ``(N, ...)``; one pair for batched ones ``(B, h*w, ...)``.
        window: Side of a window, in tokens.
        score_bias: A :class:`uhd_ops.nn.score_bias.ScoreBias`, or None.
    """

    shares_heads = True

    def __init__(self, grids: Grids, window: int, score_bias: nn.Module | None = None) -> None:
        self.grids, self.window, self.score_bias = grids, window, score_bias

    def rotates(self, positions: Rotary, tokens: torch.Tensor, dropout: float) -> bool:
        """The operator does, for tables that are not learned, in windows of its own kernels."""
        if self.score_bias is not None or dropout:
            return False
        if tokens.device.type == "cuda" and self.window > LARGEST_OWN:
            return False
        learned = torch.is_grad_enabled() and any(table.requires_grad for table in positions)
        dtypes = {torch.float32}
        if autocast_dtype(tokens) is None:
            dtypes.add(tokens.dtype)
        known = all(table.dtype in dtypes for table in positions)
        return known and not learned

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
        **rotary: Any,
    ) -> torch.Tensor:
        """Attend in windows, by the operator where it has all that is asked for."""
        if self.score_bias is None and not dropout:
            return window_attention(q, k, v, self.grids, self.window, scale=scale, **rotary)
        return gathered_window_attention(
            q,
            k,
            v,
            self.grids,
            self.window,
            scale=scale,
            score_bias=self.score_bias,
            dropout=dropout,
        )

    def attend_packed(
        self, qkv: torch.Tensor, *, scale: float | None, dropout: float, **rotary: Any
    ) -> torch.Tensor:
        """As in the base class, with one gradient for all three."""
        if self.score_bias is None and not dropout:
            return window_attention_qkvpacked(qkv, self.grids, self.window, scale=scale, **rotary)
        return super().attend_packed(qkv, scale=scale, dropout=dropout)

    def run_module(
        self, module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Windows of one shape, of which a view has at most four, are one batch."""
        tokens, parts = x if x.dim() == 3 else x[None], []
        where = Windows.of(PackedGrids.of(self.grids), self.window, x.device)
        by_shape, place = where.by_shape()
        for rows in by_shape.values():
            windows = tokens[:, rows]  # (B, n, height * width, C)
            parts.append(module(windows.flatten(0, 1)).view(windows.shape).flatten(1, 2))
        if parts:
            tokens = torch.cat(parts, 1).index_select(1, place)
        return tokens.reshape(x.shape)

    def drop(self, branch: torch.Tensor, probability: float) -> torch.Tensor:
        """As in the base class."""
        return drop_views(branch, probability, self.grids)


class QueryScope(Scope):
    """One query for each window attends to its tokens; the results are one for each window.

    Args:
        grids: As for WindowScope.
        window: Side of a window, in tokens.
        query: ``"cross_top_left"`` for the query of the top-left token, ``"cross_mean"`` for the
            mean of all of them.
        x: Tokens of the grids, ``(N, C)`` or ``(B, h*w, C)``.
    """

    def __init__(self, grids: Grids, window: int, query: str, x: torch.Tensor) -> None:
        self.grids, self.window, self.query = grids, window, query
        self.where = locate(x, "x", grids, window, ("C",))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Return ``(M, H, D)`` for M windows, or ``(B, M / B, H, D)``."""
        tokens, present = self.where.slots()
        k, v = (_gather(self.where.pack(y), tokens) for y in (k, v))  # (M, H, f², D)
        out = functional.scaled_dot_product_attention(
            self.where.pack_windows(self._pick(q, q.dim() - 3))[:, :, None],
            k,
            v,
            attn_mask=present[:, None, None],
            dropout_p=dropout,
            scale=scale,
        )
        return self.where.unpack_windows(out.squeeze(-2))

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """One row for each window: that of its top-left token, or the mean."""
        return self._pick(x, x.dim() - 2)

    def _pick(self, y: torch.Tensor, dim: int) -> torch.Tensor:
        if self.query == "cross_top_left":
            first = self.where.slots()[0][:, 0]
            return self.where.unpack_windows(self.where.pack(y).index_select(0, first))
        merged = window_mean(y.flatten(dim + 1), self.grids, self.window)
        return merged.unflatten(-1, y.shape[dim + 1 :])

    def drop(self, branch: torch.Tensor, probability: float) -> torch.Tensor:
        """As in the base class."""
        return drop_views(branch, probability, self.grids, self.window)


class ViewScope(Scope):
    """The tokens of a view attend to each other, its class and register tokens among them.

    Args:
        grids: Grids of the views, packed.
        prefix: Number of tokens in front of the patches of every view.
        bias: What is added to the scores, one entry for each view; None for nothing. An entry is a
            tensor ``(H, L, L)``, queries by keys of all L tokens of the view, or a function that
            makes one, ``(V, H, L, L)``, of queries ``(V, H, L, D)``. Views that share an entry, the
            same object, are computed together.
    """

    def __init__(
        self, grids: PackedGrids, prefix: int = 0, bias: Sequence[Any] | None = None
    ) -> None:
        self.grids, self.bias = grids.sequences(prefix), bias

    @property
    def lengths(self) -> list[int]:
        """Tokens of each view."""
        return [length for _, length in self.grids]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attend in views, those of one length and one bias at a time; no mask, no padding."""
        if self.bias is None and not dropout:
            return attend_views(q, k, v, self.grids, scale)

        def attend(views: list[torch.Tensor], first: int) -> torch.Tensor:
            q, k, v = (y.transpose(-3, -2) for y in views)
            bias = None if self.bias is None else self.bias[first]
            bias = bias(q) if callable(bias) else bias
            mask = None if bias is None else bias.to(q.dtype)
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
            )
            return out.transpose(-3, -2)

        lengths = self.lengths
        kinds = self.bias and [*zip(lengths, map(id, self.bias), strict=True)]
        return by_group(attend, (q, k, v), lengths, kinds)

    def run_module(
        self, module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Views of one length are one batch."""
        return by_group(lambda views, _: module(views[0]), (x,), self.lengths)

    def drop(self, branch: torch.Tensor, probability: float) -> torch.Tensor:
        """As in the base class."""
        return drop_path(branch, probability, self.grids)


def drop_path(
    branch: torch.Tensor, probability: float, grids: PackedGrids | None = None
) -> torch.Tensor:
    """Drop the residual branch of whole views at random; scale what is kept by ``1 / (1 - p)``.

    Args:
        branch: ``(B, L, C)``, one view per row of the batch; or packed ``(N, C)`` with ``grids``.
        probability: Of dropping a view.
        grids: Grids of packed tokens; None for batched ones.
    """
    if probability == 0.0:
        return branch
    views = branch.shape[0] if grids is None else grids.num_views
    keep = branch.new_empty((views, 1)).bernoulli_(1 - probability)
    if probability < 1.0:
        keep = keep / (1 - probability)
    if grids is None:
        return branch * keep[:, None]
    return branch * keep.index_select(0, Windows.of(grids, 1, branch.device).view_of_token())


def drop_views(
    branch: torch.Tensor, probability: float, grids: Grids, factor: int = 1
) -> torch.Tensor:
    """Drop the branch of whole views, whose tokens lie on the grids merged by ``factor``."""
    if branch.dim() == 3:
        return drop_path(branch, probability)
    return drop_path(branch, probability, PackedGrids.of(grids).merged(factor))


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

    The operator has neither.

    Args:
        q: Queries ``(N, H, D)``, or ``(B, h*w, H, D)`` with one grid.
        k: Keys, of so many heads or fewer, as for the operator.
        v: Values, likewise.
        grids: Grids of the tokens.
        window: Side of a window.
        scale: Factor on the scores; None means ``D ** -0.5``.
        score_bias: A :class:`uhd_ops.nn.score_bias.ScoreBias`, or None.
        dropout: Probability of dropping an attention weight.
    """
    where = locate(q, "q", grids, window, ("H", "D"))
    if k.shape[-2] != q.shape[-2]:
        k, v = _repeated(q.shape[-2] // k.shape[-2], k, v)
    tokens, present = where.slots()
    q, k, v = (_gather(where.pack(x), tokens) for x in (q, k, v))
    # A ragged window attends among its own tokens.
    mask = present[:, None, None]
    if score_bias is not None:
        mask = score_bias(q).masked_fill(~mask, -torch.inf)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    out = out.transpose(1, 2).flatten(0, 1).index_select(0, where.slot_of_token())
    return where.unpack_tokens(out)


def _gather(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens ``(N, H, D)`` in the slots ``(M, f²)`` of windows: ``(M, H, f², D)``."""
    return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
