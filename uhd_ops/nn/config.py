# SPDX-License-Identifier: Apache-2.0
"""The options of compressors, in the words that modules, retrofit, FLOPs and command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from uhd_ops._checks import check_int, check_positive_int, is_int
from uhd_ops.nn.attention import QUERIES
from uhd_ops.nn.mlp_forms import FORMS
from uhd_ops.nn.positions import POSITIONS
from uhd_ops.nn.window_token_compressor import POOLS

ATTENTIONS = ("window", "none", *QUERIES)
MLPS = ("reuse", "plain", "none")


@dataclasses.dataclass(frozen=True, repr=False)
class CompressorConfig:
    """What stands behind which blocks of a vision transformer.

    By default a :class:`uhd_ops.nn.EarlyCompressor`; with ``pool`` a
    :class:`uhd_ops.nn.WindowTokenCompressor` behind each of the blocks. The options mean the same
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
    attention: str = "window"
    mlp: str = "reuse"
    form: str = "dense"
    window: int = 2
    positions: str = "center"
    pool: str | None = None
    hidden_dim: int | None = None

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


def attention_name(attention: bool | str) -> str:
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
