# SPDX-License-Identifier: Apache-2.0
"""A transformer block by its parts, whatever its class: to be reused, and to be run.

A block is a sum of attention branches followed by a sum of MLP branches::

    Y = X + sum_j post_j(proj(attention(norm_j(X))))
    out = Y + sum_j post_j(mlp(norm_j(Y)))

Nearly every block has one of each. A pre-norm block has ``norm`` and maybe a LayerScale as
``post``; a post-norm block has its norm as ``post`` and no ``norm``. Where attention and MLP run in
parallel, the MLP reads X. ``uhd_ops/retrofit/families`` holds one file per family that fills these
in.

A description refers to the parts and copies none. :class:`uhd_ops.nn.EarlyCompressor` copies them,
which it can only where they are plain (:func:`uhd_ops.nn.modules.check_reusable`).
:meth:`BlockSpec.run` computes the block on packed tokens with the parts as they are, by calling
them: adapters, quantised layers and hooks of leaf modules take effect, and gradients arrive in the
host. Parts that a host holds in another shape are views: :class:`uhd_ops.nn.modules.LinearView`,
:class:`uhd_ops.nn.modules.ScaleView`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import check_finite, check_positive_int
from uhd_ops.nn.attention import Scope, end_branch, run_attention, run_own_attention
from uhd_ops.nn.positions import Rotary
from uhd_ops.ops.pixel_unshuffle_mlp import ACTIVATIONS, Activation, check_activation

if TYPE_CHECKING:
    from uhd_ops.nn.modules import Limits  # which stands on this file


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """An attention branch, by its parts; none of them is copied here.

    Attributes:
        num_heads: Heads of the queries.
        projections: The fused projection, weight ``(3 * num_heads * head_dim, C)``; or those of
            queries, keys and values, the latter two of ``num_kv_heads * head_dim`` rows.
        proj: Output projection.
        head_dim: Channels of a head.
        num_kv_heads: Heads of keys and values; None means ``num_heads``.
        scale: Factor on the scores; None means ``head_dim ** -0.5``.
        norm: Norm in front of the branch, over C, or None.
        q_norm: Norm of the queries, over head_dim, or None; so are those of keys and values.
        k_norm: Norm of the keys.
        v_norm: Norm of the values.
        joint_norms: Whether the norms of queries and keys are over all of their heads together,
            ``num_heads * head_dim`` channels, instead.
        inner_norm: Norm of what the heads return, over all of them, or None.
        gate: Projection whose sigmoid multiplies what the heads return, or None.
        rotate_half: How rotary embeddings pair the channels of a head; see
            :func:`uhd_ops.window_attention`. Whether there are any is the caller's business.
        score_bias: Makes the module that adds to the scores, given the side of a window; or None.
            See ``uhd_ops.nn.score_bias.ScoreBias``.
        post: What follows the projection: LayerScale factors ``(C,)``, a norm, or None.
        attention_dropout: Probability for the attention weights; those below for what their names
            say. All act in training only.
        proj_dropout: For the output of the branch.
        drop_path: For the whole branch of a view.
    """

    num_heads: int
    projections: tuple[nn.Module, ...]
    proj: nn.Module
    head_dim: int
    num_kv_heads: int | None = None
    scale: float | None = None
    norm: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    v_norm: nn.Module | None = None
    joint_norms: bool = False
    inner_norm: nn.Module | None = None
    gate: nn.Module | None = None
    rotate_half: int = 0
    score_bias: Callable[[int], nn.Module] | None = None
    post: torch.Tensor | nn.Module | None = None
    attention_dropout: float = 0.0
    proj_dropout: float = 0.0
    drop_path: float = 0.0

    run = run_attention


@dataclass(frozen=True, eq=False)
class OwnAttentionSpec:
    """An attention branch that is computed by the host's own attention module.

    For attention that is not a softmax over scores of queries and keys (talking heads, differential
    attention): the module, or a copy, runs on groups of tokens that attend to each other.

    Attributes:
        module: The attention module, ``(n, L, C)`` to ``(n, L, C)``.
        linears: Names of its linear layers.
        norm: As for AttentionSpec, like those below.
        post: What follows the module.
        drop_path: For the whole branch of a view.
    """

    module: nn.Module
    linears: tuple[str, ...] = ("qkv", "proj")
    norm: nn.Module | None = None
    post: torch.Tensor | nn.Module | None = None
    drop_path: float = 0.0

    run = run_own_attention


@dataclass(frozen=True, eq=False)
class MlpSpec:
    """An MLP branch: ``fc2(inner_norm(activation(fc1(x))))``.

    With a gate, ``activation(gate(x)) * fc1(x)`` stands in for ``activation(fc1(x))``.

    Attributes:
        fc1: Weight ``(I, C)``.
        fc2: Weight ``(C, I)``.
        activation: By the name that ``pixel_unshuffle_mlp`` uses.
        gate: Weight ``(I, C)``, or None.
        norm: Norm in front of the branch, over C, or None; tiled over the patches of a window.
        patch_norm: A second norm in front, over C, that stays per patch; or None.
        inner_norm: Norm of the hidden layer, over I, that stays per patch; or None.
        limits: What clamps the input and the output of ``"fc1"``, ``"gate"`` and ``"fc2"``, for
            those of them that are clamped. The output of fc2 is that of the whole window.
        post: LayerScale factors ``(C,)``, a norm, or None.
        hidden_dropout: Probability for the hidden layer, in training.
        output_dropout: For the output of the MLP.
        drop_path: For the whole branch of a view.
    """

    fc1: nn.Module
    fc2: nn.Module
    activation: str
    gate: nn.Module | None = None
    norm: nn.Module | None = None
    patch_norm: nn.Module | None = None
    inner_norm: nn.Module | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)
    post: torch.Tensor | nn.Module | None = None
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    drop_path: float = 0.0

    def run(self, x: torch.Tensor, scope: Scope, *, training: bool = False) -> torch.Tensor:
        """Return what the branch adds to tokens ``x``; arguments as for BlockSpec.run."""
        for norm in (self.norm, self.patch_norm):
            x = x if norm is None else norm(x)
        act = ACTIVATIONS[self.activation]
        hidden = self._within_limits("fc1", self.fc1, x)
        if self.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(self._within_limits("gate", self.gate, x)) * hidden
        hidden = functional.dropout(hidden, self.hidden_dropout, training)
        if self.inner_norm is not None:
            hidden = self.inner_norm(hidden)
        y = self._within_limits("fc2", self.fc2, hidden)
        y = functional.dropout(y, self.output_dropout, training)
        return end_branch(self, y, scope, training)

    def _within_limits(self, name: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        limits = self.limits.get(name)
        return layer(x) if limits is None else limits(x, layer)


class _KeepViews(Scope):
    """Another scope without drop path."""

    def __init__(self, scope: Scope) -> None:
        self.attend, self.run_module, self.pick = scope.attend, scope.run_module, scope.pick

    def drop(self, branch: torch.Tensor, probability: float) -> torch.Tensor:
        return branch


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """A transformer block by its branches.

    Attributes:
        dim: Channels C.
        attentions: Attention branches; they are added.
        mlps: MLP branches; they are added.
        parallel: Whether the MLPs read what the attention reads.
        drop_together: Whether :meth:`run` drops the branches of a view all or none; only where they
            are parallel.
        block: The block that was read, or None.
        name: What to call it in messages.
    """

    dim: int
    attentions: tuple[AttentionSpec | OwnAttentionSpec, ...]
    mlps: tuple[MlpSpec, ...]
    parallel: bool = False
    drop_together: bool = False
    block: nn.Module | None = None
    name: str = "block"

    def run(
        self,
        x: torch.Tensor,
        scope: Scope,
        positions: Rotary | None = None,
        *,
        training: bool | None = None,
    ) -> torch.Tensor:
        """Run the block on packed tokens, with its parts as they are now.

        Args:
            x: Tokens ``(N, C)``, or what else the scope takes.
            scope: Which tokens attend to which, and where the views are: for whole views a
                :class:`uhd_ops.nn.attention.ViewScope`.
            positions: Rotary embeddings of the tokens, or None.
            training: Whether dropout and drop path act; None means ``block.training``.

        Returns:
            ``(N, C)``.

        Raises:
            NotImplementedError: ``positions`` are given, but the attention takes none.
        """
        if training is None:
            training = self.block is not None and self.block.training
        inner = _KeepViews(scope) if self.drop_together else scope
        branches = [part.run(x, inner, positions, training=training) for part in self.attentions]
        y = x
        if not self.parallel:
            y, branches = functools.reduce(torch.add, branches, x), []
        branches += [part.run(y, inner, training=training) for part in self.mlps]
        if self.drop_together:
            total = functools.reduce(torch.add, branches)
            return y + (scope.drop(total, self.mlps[0].drop_path) if training else total)
        return functools.reduce(torch.add, branches, y)

    @classmethod
    def random(
        cls,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int | None,
        head_dim: int | None,
        bias: bool,
        qk_norm: bool,
        layer_scale: float | None,
        activation: Activation,
        eps: float,
        attention_dropout: float,
        dropout: float,
        drop_path: float,
        **factory: object,
    ) -> BlockSpec:
        """Make a block with torch's own initialisation; arguments as for EarlyCompressor."""
        _check_rates(attention_dropout=attention_dropout, dropout=dropout, drop_path=drop_path)
        check_activation(activation)
        _check_flags(bias=bias, qk_norm=qk_norm)
        if check_finite(eps, "eps") < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if layer_scale is not None:
            check_finite(layer_scale, "layer_scale")
        dim, num_heads, head_dim, hidden_dim = _check_sizes(dim, num_heads, head_dim, hidden_dim)
        gamma = None if layer_scale is None else torch.full((dim,), float(layer_scale), **factory)
        head_norm = nn.LayerNorm(head_dim, eps, **factory) if qk_norm else None
        attention = AttentionSpec(
            num_heads,
            (nn.Linear(dim, 3 * num_heads * head_dim, bias, **factory),),
            nn.Linear(num_heads * head_dim, dim, bias, **factory),
            head_dim,
            norm=nn.LayerNorm(dim, eps, **factory),
            q_norm=head_norm,
            k_norm=head_norm,
            post=gamma,
            attention_dropout=attention_dropout,
            proj_dropout=dropout,
            drop_path=drop_path,
        )
        mlp = MlpSpec(
            nn.Linear(dim, hidden_dim, bias, **factory),
            nn.Linear(hidden_dim, dim, bias, **factory),
            activation,
            norm=nn.LayerNorm(dim, eps, **factory),
            post=gamma,
            hidden_dropout=dropout,
            output_dropout=dropout,
            drop_path=drop_path,
        )
        return cls(dim, (attention,), (mlp,))


def read_block(block: nn.Module, **context: object) -> BlockSpec:
    """Read a block of another library, changing nothing.

    What is called on the way (attention, MLP, norms, activations) is accepted by exact type,
    because a subclass may compute something else. Linear layers may be of any class.

    Args:
        block: A block of one of the classes in ``uhd_ops/retrofit/registry.py``, with or without a
            compressor.
        context: What the family reads from the model around the block; optional.

    Raises:
        NotImplementedError: Another class, or a part that is not understood.
    """
    return families().read_block(block, **context)


def families() -> Any:
    """Return ``uhd_ops.retrofit.registry``, by name because it stands on this floor."""
    name = "uhd_ops.retrofit.registry"
    # torch.compile traces a look-up of what is there, but no import.
    return sys.modules.get(name) or importlib.import_module(name)


def _check_sizes(
    dim: int, num_heads: int, head_dim: int | None, hidden_dim: int | None
) -> tuple[int, int, int, int]:
    """Check the sizes; return them as ints, with defaults filled in."""
    dim, num_heads = check_positive_int(dim, "dim"), check_positive_int(num_heads, "num_heads")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
    head_dim = dim // num_heads if head_dim is None else head_dim
    hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
    head_dim = check_positive_int(head_dim, "head_dim")
    return dim, num_heads, head_dim, check_positive_int(hidden_dim, "hidden_dim")


def _check_rates(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= check_finite(value, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
