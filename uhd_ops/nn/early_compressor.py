# SPDX-License-Identifier: Apache-2.0
"""The intra-ViT compressor: window attention, pixel-unshuffle and the reused MLP, as one module."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.layers import Weights, clone_leaf, layer_scale_of, tile_norm
from uhd_ops.nn.mlp_forms import FORMS, MlpWeights, convert_mlp
from uhd_ops.nn.regularization import (
    drop_path,
    pixel_unshuffle_mlp_with_dropout,
    window_attention_with_dropout,
)
from uhd_ops.ops._arguments import check_positive_int, check_tensor, layout_of
from uhd_ops.ops.pixel_unshuffle_mlp import pixel_unshuffle_mlp
from uhd_ops.ops.window_attention import window_attention
from uhd_ops.ops.window_mean import window_mean


class EarlyCompressor(nn.Module):
    """Merge each window of tokens into one, inside a vision transformer.

    With the tokens X of a view, and the tokens ``i`` of a window::

        Y = X + ls1(proj(window_attention(qkv(norm1(X)))))
        z = concatenation of the Y_i of the window           (window² * C channels)
        y = mean_i Y_i + ls2(fc2(activation(fc1(norm2(z)))))

    The attention is that of a transformer block restricted to each window, without positions. A
    ragged window attends among the tokens it holds, z repeats the nearest of them, and the mean is
    over them. ``fc1`` starts block-diagonal and ``fc2`` as a mean, so the MLP starts as one MLP for
    every patch, averaged over the window; with :meth:`from_block`, as that of a trained block.

    Args:
        dim: Channels C of a token.
        num_heads: Attention heads; must divide ``dim`` unless ``head_dim`` is given.
        hidden_dim: Hidden channels I of the MLP for one patch; None means ``4 * dim``.
        head_dim: Channels of a head; None means ``dim // num_heads``.
        window: Side f of a window, in tokens.
        form: Weight form of the MLP: ``"dense"``, ``"block"`` or ``"tied"``. All three start as the
            same function; dense has f⁴ times the weights of tied in fc1.
        attention: Whether to attend inside the windows before merging.
        bias: Whether the projections and the MLP have biases.
        qk_norm: Whether queries and keys have a LayerNorm per head.
        layer_scale: Initial value of the two LayerScale factors, or None for none.
        activation: As for :func:`uhd_ops.pixel_unshuffle_mlp`.
        eps: Of the norms.
        attention_dropout: Probability of dropping an attention weight, in training.
        dropout: Of an output of either branch, and of a hidden channel of the MLP.
        drop_path: Of either branch of a whole view.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``form`` or ``activation`` is unknown, a size is below 1, ``window`` below 2, a
            probability outside 0..1, ``eps`` negative, or ``num_heads`` does not divide ``dim``.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one ``(h, w)`` grid.
        Result: ``(M, C)`` merged tokens, or ``(B, M / B, C)``.

    Source:
        LLaVA-UHD v4, section 3.2; without attention, its "Reused MLP" variant of Table 4.

    Example:
        >>> compressor = EarlyCompressor(dim=32, num_heads=2, form="tied")
        >>> compressor(torch.randn(4 * 6 + 3 * 5, 32), [(4, 6), (3, 5)]).shape
        torch.Size([12, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int | None = None,
        head_dim: int | None = None,
        window: int = 2,
        form: str = "dense",
        attention: bool = True,
        bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        activation: str = "gelu_tanh",
        eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        host = HostBlock.random(
            dim,
            num_heads,
            hidden_dim=hidden_dim,
            head_dim=head_dim,
            bias=bias,
            qk_norm=qk_norm,
            layer_scale=layer_scale,
            activation=activation,
            eps=eps,
            attention_dropout=attention_dropout,
            dropout=dropout,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )
        self._build(host, window, form, attention)

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        *,
        window: int = 2,
        form: str = "dense",
        attention: bool = True,
    ) -> EarlyCompressor:
        """Make the compressor that reuses the weights of a transformer block.

        ``norm1``, ``qkv``, ``q_norm``, ``k_norm``, ``proj`` and the LayerScale factors are copied;
        ``norm2`` is tiled over the patches of a window; with the block's MLP ``F1, b1, F2, b2`` and
        n = window², ``W1 = blockdiag(F1, ..., F1)``, ``b1`` is tiled, ``W2 = [F2 | ... | F2] / n``
        and ``b2`` stays as it is. Probabilities of dropout and drop path are the block's. All
        parameters are new, trainable, on the block's device and in its dtype.

        Args:
            block: timm's ``Block``: pre-norm, a plain MLP, a fused qkv. It is not changed.
            window: Side f of a window, in tokens.
            form: Weight form of the MLP.
            attention: Whether to attend inside the windows before merging.

        Raises:
            ImportError: timm is not installed.
            NotImplementedError: The block has a part that is not understood.
            ValueError: ``form`` or ``window`` is out of range.

        Source:
            LLaVA-UHD v4, section 3.2: parameter reuse initialisation.
        """
        host = HostBlock.of(block)
        compressor = cls.__new__(cls)
        nn.Module.__init__(compressor)
        compressor._build(host, window, form, attention)
        return compressor.train(block.training)

    def _build(self, host: HostBlock, window: int, form: str, attention: bool) -> None:
        _check_options(window, form, attention)
        self.dim, self.num_heads, self.window = host.dim, host.num_heads, window
        self.form, self.attention, self.activation = form, attention, host.activation
        self.drop_path1, self.drop_path2 = host.drop_path1, host.drop_path2
        if attention:
            self.norm1 = clone_leaf(host.norm1)
            self.qkv, self.proj = clone_leaf(host.qkv), clone_leaf(host.proj)
            self.q_norm, self.k_norm = clone_leaf(host.q_norm), clone_leaf(host.k_norm)
            self.attention_dropout = host.attention_dropout
            self.proj_drop = nn.Dropout(host.proj_dropout)
            self.ls1 = layer_scale_of(host.layer_scale1)
        self.norm2 = tile_norm(host.norm2, window**2)
        with torch.no_grad():
            mlp = convert_mlp(host.mlp, form, factor=window, channels=host.dim)
        self.fc1 = Weights(mlp.fc1_weight, mlp.fc1_bias)
        self.fc2 = Weights(mlp.fc2_weight, mlp.fc2_bias)
        self.hidden_dropout = host.hidden_dropout
        self.output_drop = nn.Dropout(host.output_dropout)
        self.ls2 = layer_scale_of(host.layer_scale2)

    def forward(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Merge the windows of packed or batched tokens.

        Args:
            x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid; no class or register tokens.
            grids: Their grids.

        Returns:
            Merged tokens ``(M, C)``, or ``(B, M / B, C)``, on the grids
            ``PackedGrids(grids).merged(window)``.

        Raises:
            TypeError: ``x`` is no tensor of a floating dtype, or ``grids`` has no accepted form.
            ValueError: ``x`` has another number of tokens or channels.
        """
        check_tensor(x, "x")
        layout_of(x, "x", grids, self.window, ("C",))
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have C = {self.dim} channels, got shape {tuple(x.shape)}")
        if self.attention:
            branch = self.ls1(self._attend(self.norm1(x), grids))
            x = x + self._drop_path(branch, self.drop_path1, grids)
        return self._merge(x, grids)

    def _attend(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        # Under autocast a norm returns float32.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.training and self.attention_dropout:
            y = window_attention_with_dropout(q, k, v, grids, self.window, self.attention_dropout)
        else:
            y = window_attention(q, k, v, grids, self.window)
        return self.proj_drop(self.proj(y.flatten(-2)))

    def _merge(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        plain = isinstance(self.ls2, nn.Identity)
        regularized = self.drop_path2 or self.hidden_dropout or self.output_drop.p
        if plain and not (self.training and regularized):
            return self._mlp(x, grids, residual=True)
        if self.training and self.hidden_dropout:
            branch = pixel_unshuffle_mlp_with_dropout(
                x,
                grids,
                MlpWeights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias),
                norm=self.norm2,
                factor=self.window,
                activation=self.activation,
                p=self.hidden_dropout,
            )
        else:
            branch = self._mlp(x, grids, residual=False)
        branch = self.ls2(self.output_drop(branch))
        branch = self._drop_path(branch, self.drop_path2, grids, self.window)
        return window_mean(x, grids, self.window) + branch

    def _mlp(self, x: torch.Tensor, grids: Grids, residual: bool) -> torch.Tensor:
        return pixel_unshuffle_mlp(
            x,
            grids,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            norm_weight=self.norm2.weight,
            norm_bias=self.norm2.bias,
            eps=self.norm2.eps,
            factor=self.window,
            activation=self.activation,
            residual=residual,
        )

    def _drop_path(
        self, branch: torch.Tensor, probability: float, grids: Grids, factor: int = 1
    ) -> torch.Tensor:
        """Drop the branch of whole views; it lives on the grids merged by ``factor``."""
        if not (self.training and probability):
            return branch
        if branch.dim() == 3:
            return drop_path(branch, probability)
        lengths = [h * w for h, w in PackedGrids.of(grids).merged(factor)]
        return drop_path(branch, probability, lengths)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, "
            f"form={self.form!r}, attention={self.attention}, activation={self.activation!r}"
        )


def _check_options(window: int, form: str, attention: bool) -> None:
    check_positive_int(window, "window")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    if form not in FORMS:
        raise ValueError(f'form must be "dense", "block" or "tied", got {form!r}')
    if not isinstance(attention, bool):
        raise TypeError(f"attention must be a bool, got {type(attention).__name__}")
