# SPDX-License-Identifier: Apache-2.0
"""What the reuse initialisation and the slice encoder take from a transformer block of a host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from uhd_ops.nn.mlp_forms import MlpWeights
from uhd_ops.ops._arguments import check_finite, check_positive_int
from uhd_ops.reference.pixel_unshuffle_mlp import ACTIVATIONS


@dataclass(frozen=True, eq=False)
class HostBlock:
    """A pre-norm block ``x + ls1(attention(norm1(x)))``, ``x + ls2(mlp(norm2(x)))``, by its parts.

    Attributes:
        num_heads: Heads of the attention.
        norm1: Norm in front of the attention, over C.
        qkv: Fused projection; weight ``(3 * num_heads * head_dim, C)``.
        q_norm: Norm of the queries, over head_dim, or None.
        k_norm: Norm of the keys, or None.
        proj: Output projection.
        layer_scale1: Factor ``(C,)`` on the attention branch, or None.
        norm2: LayerNorm in front of the MLP, over C.
        mlp: Weights of the MLP: fc1 ``(I, C)``, fc2 ``(C, I)``, the *tied* form.
        activation: Its activation, by the name that ``pixel_unshuffle_mlp`` uses.
        layer_scale2: Factor ``(C,)`` on the MLP branch, or None.
        attention_dropout: Probability for the attention weights; those below for what their names
            say. All act in training only.
        proj_dropout: For the output of the attention branch.
        hidden_dropout: For the hidden layer of the MLP.
        output_dropout: For the output of the MLP.
        drop_path1: For the whole attention branch of a view.
        drop_path2: For the whole MLP branch of a view.
    """

    num_heads: int
    norm1: nn.Module
    qkv: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    proj: nn.Linear
    layer_scale1: torch.Tensor | None
    norm2: nn.LayerNorm
    mlp: MlpWeights
    activation: str
    layer_scale2: torch.Tensor | None
    attention_dropout: float
    proj_dropout: float
    hidden_dropout: float
    output_dropout: float
    drop_path1: float
    drop_path2: float

    @property
    def dim(self) -> int:
        """Channels C."""
        return self.qkv.in_features

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.qkv.out_features // (3 * self.num_heads)

    @classmethod
    def of(cls, block: nn.Module) -> HostBlock:
        """Read a block, changing nothing.

        Args:
            block: timm's ``vision_transformer.Block``.

        Raises:
            ImportError: timm is not installed.
            NotImplementedError: Another class, or a part that is not understood.
        """
        from uhd_ops.nn.timm_block import read_timm_block

        return read_timm_block(block)

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
        activation: str,
        eps: float,
        attention_dropout: float,
        dropout: float,
        drop_path: float,
        **factory: object,
    ) -> HostBlock:
        """Make a block with torch's own initialisation; arguments as for EarlyCompressor."""
        _check_rates(attention_dropout=attention_dropout, dropout=dropout, drop_path=drop_path)
        _check_activation(activation)
        for name, value in (("bias", bias), ("qk_norm", qk_norm)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
        if check_finite(eps, "eps") < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if layer_scale is not None:
            check_finite(layer_scale, "layer_scale")
        head_dim, hidden_dim = _check_sizes(dim, num_heads, head_dim, hidden_dim)
        fc1 = nn.Linear(dim, hidden_dim, bias, **factory)
        fc2 = nn.Linear(hidden_dim, dim, bias, **factory)
        gamma = None if layer_scale is None else torch.full((dim,), float(layer_scale), **factory)
        head_norm = nn.LayerNorm(head_dim, eps, **factory) if qk_norm else None
        return cls(
            num_heads=num_heads,
            norm1=nn.LayerNorm(dim, eps, **factory),
            qkv=nn.Linear(dim, 3 * num_heads * head_dim, bias, **factory),
            q_norm=head_norm,
            k_norm=head_norm,
            proj=nn.Linear(num_heads * head_dim, dim, bias, **factory),
            layer_scale1=gamma,
            norm2=nn.LayerNorm(dim, eps, **factory),
            mlp=MlpWeights(fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            activation=activation,
            layer_scale2=gamma,
            attention_dropout=attention_dropout,
            proj_dropout=dropout,
            hidden_dropout=dropout,
            output_dropout=dropout,
            drop_path1=drop_path,
            drop_path2=drop_path,
        )


def _check_sizes(
    dim: int, num_heads: int, head_dim: int | None, hidden_dim: int | None
) -> tuple[int, int]:
    """Check the sizes; return head_dim and hidden_dim with their defaults filled in."""
    for name, value in (("dim", dim), ("num_heads", num_heads)):
        check_positive_int(value, name)
    if head_dim is None and dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
    head_dim = dim // num_heads if head_dim is None else head_dim
    hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
    for name, value in (("head_dim", head_dim), ("hidden_dim", hidden_dim)):
        check_positive_int(value, name)
    return head_dim, hidden_dim


def _check_rates(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= check_finite(value, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        names = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
