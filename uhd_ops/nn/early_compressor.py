# SPDX-License-Identifier: Apache-2.0
"""The intra-ViT compressor: window attention, pixel-unshuffle and the reused MLP, as one module.

Its options are those of every compressor, in the words that modules, retrofit, FLOPs and command
line share. Its attention branches are copies of a host's parts that run in windows; the MLP branch
is in :mod:`uhd_ops.nn.mlp_forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import nn

from uhd_ops._checks import check_int, check_positive_int, is_int
from uhd_ops.grids import Grids
from uhd_ops.nn.attention import (
    QUERIES,
    Query,
    QueryScope,
    WindowScope,
    run_attention,
    run_own_attention,
)
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, OwnAttentionSpec, read_block
from uhd_ops.nn.mlp_forms import FORMS, Form, NoMlp, PlainMlp, WindowMlp
from uhd_ops.nn.modules import check_reusable, clone_module
from uhd_ops.nn.positions import POSITIONS, Positions, Rotary
from uhd_ops.nn.window_token_compressor import POOLS, Pool
from uhd_ops.ops.pixel_unshuffle_mlp import Activation
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.windows import check_tokens, parsed

AttentionKind: TypeAlias = Literal["window", "none"] | Query
ATTENTIONS: tuple[AttentionKind, ...] = ("window", "none", *QUERIES)
MlpKind = Literal["reuse", "plain", "none"]
MLPS: tuple[MlpKind, ...] = get_args(MlpKind)


@dataclasses.dataclass(frozen=True, repr=False)
class CompressorConfig:
    """Options of the compressors in a vision transformer, and the blocks that they follow.

    By default a :class:`uhd_ops.nn.EarlyCompressor`; with ``pool`` a
    :class:`uhd_ops.nn.WindowTokenCompressor` after each of the blocks. The options mean the same
    in :func:`uhd_ops.insert_early_compressor`, :func:`uhd_ops.insert_progressive_compression` and
    the two classes, and the entries of :data:`uhd_ops.nn.ABLATION` are options too.

    Args:
        layers: 0-based indices of the blocks, ascending; for an early compressor also an int.
        attention: What happens in a window before it is merged: ``"window"``, every token attends
            inside it; ``"none"``; ``"cross_top_left"`` or ``"cross_mean"``, one query does. True
            and False are short for the first two.
        mlp: ``"reuse"`` for the block's own MLP, ``"plain"`` or ``"none"``.
        form: Weight form of the reused MLP: ``"dense"``, ``"block"`` or ``"tied"``.
        window: Side of a window, in tokens.
        positions: Positions of merged tokens: ``"center"`` or ``"reindex"``.
        pool: ``"adaptive"``, ``"mean"`` or ``"unshuffle"`` for pooling, which has neither
            attention, MLP nor form; None for an early compressor, which has one layer.
        hidden_dim: Hidden channels of the pooling's MLP, or None for its default.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is none of those above, options exclude each other, ``window`` is
            below 2, or ``layers`` are negative or do not ascend.

    Example:
        >>> CompressorConfig(layers=(3, 17), pool="mean")
        CompressorConfig(layers=(3, 17), window=2, positions='center', pool='mean', hidden_dim=None)
    """

    layers: tuple[int, ...] = (6,)
    attention: AttentionKind = "window"
    mlp: MlpKind = "reuse"
    form: Form = "dense"
    window: int = 2
    positions: Positions = "center"
    pool: Pool | None = None
    hidden_dim: int | None = None

    if TYPE_CHECKING:  # what the fields are made from

        def __init__(
            self,
            layers: int | Sequence[int] = (6,),
            attention: bool | AttentionKind = "window",
            mlp: MlpKind = "reuse",
            form: Form = "dense",
            window: int = 2,
            positions: Positions = "center",
            pool: Pool | None = None,
            hidden_dim: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        put, early = object.__setattr__, self.pool is None
        put(self, "layers", _check_layers(self.layers, "layer" if early else "layers"))
        put(self, "attention", attention_name(self.attention))
        put(self, "window", check_positive_int(self.window, "window"))
        if self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window}")
        check_choice("positions", self.positions, POSITIONS)
        check_choice("mlp", self.mlp, MLPS)
        check_choice("form", self.form, FORMS)
        if self.hidden_dim is not None:
            put(self, "hidden_dim", check_positive_int(self.hidden_dim, "hidden_dim"))
        if early:
            self._check_early()
        else:
            self._check_pool()

    def _check_early(self) -> None:
        if self.attention in QUERIES and self.mlp == "plain":
            raise ValueError(
                f'mlp must be "reuse" or "none" with attention={self.attention!r}, got "plain"'
            )
        if len(self.layers) > 1:
            raise ValueError(f"layers must be one without pool, got {self.layers}")
        if self.hidden_dim is not None:
            raise ValueError(f"hidden_dim must be None without pool, got {self.hidden_dim}")

    def _check_pool(self) -> None:
        check_choice("pool", self.pool, POOLS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _OF_EARLY and value != field.default:
                raise ValueError(
                    f"{field.name} must be left out with pool={self.pool!r}, got {value!r}"
                )

    @property
    def removed_by(self) -> str:
        """The function that takes out again what these options inserted."""
        return "remove_early_compressor" if self.pool is None else "remove_progressive_compression"

    def check_depth(self, depth: int) -> None:
        """Check ``layers`` against the number of blocks of a model."""
        if self.layers[-1] >= depth:
            name, got = ("layer", self.layers[0]) if self.pool is None else ("layers", self.layers)
            raise ValueError(
                f"{name} must be in 0..{depth - 1} for a model of {depth} blocks, got {got}"
            )

    def __repr__(self) -> str:
        """Show the options that apply."""
        others = _OF_POOL if self.pool is None else _OF_EARLY
        names = [f.name for f in dataclasses.fields(self) if f.name not in others]
        return f"CompressorConfig({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


_OF_EARLY, _OF_POOL = ("attention", "mlp", "form"), ("pool", "hidden_dim")


def _check_layers(layers: int | Sequence[int], name: str) -> tuple[int, ...]:
    if name == "layer" and is_int(layers):
        return (check_int(layers, name, 0),)
    if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
        kind = "an int" if name == "layer" else "a sequence of ints"
        raise TypeError(f"{name} must be {kind}, got {type(layers).__name__}")
    checked = tuple(check_int(n, f"{name}[{index}]", 0) for index, n in enumerate(layers))
    if not checked or list(checked) != sorted(set(checked)):
        raise ValueError(f"{name} must ascend, with at least one, got {checked}")
    return checked


def attention_name(attention: bool | AttentionKind) -> AttentionKind:
    """Return the name of a kind of attention; True and False are short for two of them."""
    if isinstance(attention, bool):
        return "window" if attention else "none"
    if not isinstance(attention, str):
        raise TypeError(f"attention must be a bool or a str, got {type(attention).__name__}")
    check_choice("attention", attention, ATTENTIONS)
    return attention


def check_choice(name: str, value: object, values: tuple[str, ...]) -> None:
    """Refuse a value that is none of these."""
    if value not in values:
        *first, last = (f'"{known}"' for known in values)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


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
        self.v_norm, self.joint_norms = clone_module(spec.v_norm), spec.joint_norms
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


_BRANCHES = {AttentionSpec: WindowAttention, OwnAttentionSpec: OwnWindowAttention}


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
        attention: ``"window"`` to attend inside the windows before merging; ``"none"``; or
            ``"cross_top_left"`` or ``"cross_mean"``: one query per window, that of its top-left
            token or of their mean, attends to the window, and the block's MLP runs on the merged
            token. True and False are short for the first two.
        mlp: ``"reuse"``; ``"plain"`` for a small MLP of its own, from f²C over f²C to C channels,
            randomly initialised; or ``"none"``.
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
        LLaVA-UHD v4, section 3.2. The other options are the variants of its Table 4, see
        :data:`uhd_ops.nn.ABLATION`.

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
        form: Form = "dense",
        attention: bool | AttentionKind = "window",
        mlp: MlpKind = "reuse",
        bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        activation: Activation = "gelu_tanh",
        eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        host = BlockSpec.random(
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
        config = CompressorConfig(window=window, form=form, attention=attention, mlp=mlp)
        self._build(host, config)

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        *,
        window: int = 2,
        form: Form = "dense",
        attention: bool | AttentionKind = "window",
        mlp: MlpKind = "reuse",
    ) -> EarlyCompressor:
        """Make the compressor that reuses the weights of a transformer block.

        The parts of the attention and the LayerScale factors are copied; the norm in front of the
        MLP is tiled over the patches of a window; with the block's MLP ``F1, b1, F2, b2`` and
        n = window², ``W1 = blockdiag(F1, ..., F1)``, ``b1`` is tiled, ``W2 = [F2 | ... | F2] / n``
        and ``b2`` stays as it is. A gate is treated as ``F1``; norms inside the MLP stay per patch;
        in a post-norm block the norms follow the branches; where attention and MLP run in parallel,
        the MLP reads X. Every kind has this in common: a window of equal tokens becomes what the
        block makes of that token. Probabilities of dropout and drop path are the block's. All
        parameters are new, trainable, on the block's device and in its dtype.

        Args:
            block: A block of one of the classes that ``uhd_ops/retrofit`` reads. It is not changed.
            window: Side f of a window, in tokens.
            form: Weight form of the MLP.
            attention: As for the class.
            mlp: As for the class.

        Raises:
            NotImplementedError: The block has a part that is not understood, or cannot be combined
                with these options.
            TypeError: An option has the wrong type.
            ValueError: An option is out of range.

        Source:
            LLaVA-UHD v4, section 3.2: parameter reuse initialisation.
        """
        config = CompressorConfig(window=window, form=form, attention=attention, mlp=mlp)
        return cls.from_host(read_block(block), config).train(block.training)

    @classmethod
    def from_host(cls, host: BlockSpec, config: CompressorConfig) -> EarlyCompressor:
        """As :meth:`from_block`, for a block that has been read already."""
        compressor = cls.__new__(cls)
        nn.Module.__init__(compressor)
        compressor._build(host, config)
        return compressor

    @torch.no_grad()
    def reuse_(self, block: nn.Module | BlockSpec) -> EarlyCompressor:
        """Initialise the compressor again from a block, in place, as :meth:`from_block` does.

        For a model whose weights were initialised or loaded after the compressor was made: from
        the meta device, or from a checkpoint that has none. A small MLP of its own
        (``mlp="plain"``) starts with new random weights.

        Args:
            block: A block like the one that the compressor was made from, or its description. It is
                not changed.

        Returns:
            The compressor itself, with the same parameters, in their dtype and on their device.

        Raises:
            NotImplementedError: The block has a part that is not understood.
            ValueError: The block does not have the parts or the sizes of this compressor, or the
                compressor holds other tensors than it was made with (adapters, say). Nothing is
                changed then.
        """
        spec = block if isinstance(block, BlockSpec) else read_block(block)
        new = _tensors(type(self).from_host(spec, self.config))
        own = _tensors(self)
        expected, got = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            for tensors in (own, new)
        )
        if expected != got:
            name = min(n for n in expected | got if expected.get(n) != got.get(n))
            raise ValueError(
                f"block must give the tensors of this compressor, but {name} must have shape "
                f"{expected.get(name)}, got {got.get(name)}"
            )
        for name, tensor in own.items():
            tensor.copy_(new[name])
        return self

    def _build(self, host: BlockSpec, config: CompressorConfig) -> None:
        check_reusable(host)
        window, form, self.config = config.window, config.form, config
        self.dim, self.window, self.form = host.dim, window, form
        self.attention, self.parallel = config.attention, host.parallel
        if config.attention in QUERIES:
            self._build_cross(host, config.attention, config.mlp)
            return
        if config.attention == "window":
            branches = [_BRANCHES[type(part)](part, window) for part in host.attentions]
            self.attn = _one_or_sum(branches)
        if config.mlp == "reuse":
            self.mlp = _one_or_sum([WindowMlp(part, host.dim, window, form) for part in host.mlps])
        elif config.mlp == "plain":
            self.mlp = PlainMlp(host.dim, window, like=host.mlps[0].fc2.weight)
        else:
            self.mlp = NoMlp(window)

    def _build_cross(self, host: BlockSpec, query: str, mlp: str) -> None:
        """Cross-attention merges the tokens; the host's MLP then runs on the merged ones."""
        if host.parallel or len(host.attentions) > 1:
            raise NotImplementedError(f'attention="{query}" needs a block with one attention')
        self.attn = CrossAttention(host.attentions[0], self.window, query)
        branches = [WindowMlp(part, host.dim, 1, "tied") for part in host.mlps]
        self.mlp = _one_or_sum(branches) if mlp == "reuse" else NoMlp(1)

    def forward(
        self, x: torch.Tensor, grids: Grids, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Merge the windows of packed or batched tokens.

        Args:
            x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid; no class or register tokens.
            grids: Their grids.
            positions: Rotary embeddings of the tokens, as the host applies them to its queries and
                keys; None where it has none.

        Returns:
            Merged tokens ``(M, C)``, or ``(B, M / B, C)``, on the grids
            ``PackedGrids(grids).merged(window)``.

        Raises:
            NotImplementedError: ``positions`` are given, but the attention takes none: that of a
                host without rotary embeddings, or ``attention="cross_mean"``.
            TypeError: ``x`` is not a tensor of a floating dtype, or ``grids`` has no accepted form.
            ValueError: ``x`` has another number of tokens or channels.
        """
        grids = parsed(grids, x)
        check_tokens(x, grids, self.window, self.dim)
        if self.attention in QUERIES:
            merged = self.attn(x, grids, positions)
            return self.mlp(merged, grids.merged(self.window), residual=True)
        y = x + self.attn(x, grids, positions) if self.attention == "window" else x
        if self.parallel:
            return window_mean(y, grids, self.window) + self.mlp(x, grids, residual=False)
        return self.mlp(y, grids, residual=True)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return (
            f"dim={self.dim}, window={self.window}, form={self.form!r}, "
            f"attention={self.attention!r}"
        )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those included that no checkpoint holds."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Sum(nn.ModuleList):
    """Several branches side by side."""

    def forward(
        self, x: torch.Tensor, grids: Grids, *args: Rotary | None, residual: bool = False
    ) -> torch.Tensor:
        """Add what the branches return; ``residual`` is added once."""
        first, *others = self
        options = {"residual": residual} if isinstance(first, WindowMlp) else {}
        total = first(x, grids, *args, **options)
        for branch in others:
            total = total + branch(x, grids, *args, **dict.fromkeys(options, False))
        return total


def _one_or_sum(branches: list[nn.Module]) -> nn.Module:
    return branches[0] if len(branches) == 1 else _Sum(branches)
