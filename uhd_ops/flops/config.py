# SPDX-License-Identifier: Apache-2.0
"""The sizes that the cost of a ViT and of what compresses its tokens depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from uhd_ops._checks import check_int

ATTENTIONS = (None, "window", "cross")
MLPS = (None, "reuse", "plain")
FORMS = ("dense", "block", "tied")
POOLS = ("adaptive", "mean", "unshuffle")

# The words of insert_early_compressor for what is counted alike.
_SAME_ATTENTION = {True: "window", False: None, "cross_top_left": "cross", "cross_mean": "cross"}


def _check_choice(name: str, value: object, values: tuple[str | None, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} must be one of {values}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a plain vision transformer.

    Args:
        dim: Width C of a token.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_hidden: Hidden width I of the MLP.
        patch: Side of a patch in px.
        in_channels: Colour channels.
        prefix_tokens: Class and register tokens in front of every view.

    Raises:
        TypeError: A value is not an int.
        ValueError: A value is below 1 (``prefix_tokens``: below 0), or ``heads`` does not divide
            ``dim``.
    """

    dim: int
    depth: int
    heads: int
    mlp_hidden: int
    patch: int
    in_channels: int = 3
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "prefix_tokens" else 1
            check_int(getattr(self, field.name), field.name, least)
        if self.dim % self.heads:
            raise ValueError(
                f"dim must be a multiple of heads, got dim = {self.dim} and heads = {self.heads}"
            )


SIGLIP_SO400M = ViTConfig(dim=1152, depth=27, heads=16, mlp_hidden=4304, patch=14)
"""The encoder of LLaVA-UHD v4 and MiniCPM-V 4.6; MoonViT, of LLaVA-UHD v3, has the same sizes."""


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Structure of an early compressor: one of the rows of LLaVA-UHD v4, table 4.

    The options are those of :func:`uhd_ops.insert_early_compressor`, so that
    ``CompressorConfig(**options)`` counts what ``insert_early_compressor(vit, **options)`` inserts,
    for every entry of :data:`uhd_ops.nn.ABLATION`. What is counted alike becomes the same value.

    Args:
        layer: 0-based index of the block after which it runs.
        attention: ``"window"`` or True: every token attends inside its window; ``"cross"``,
            ``"cross_top_left"`` or ``"cross_mean"``: one query per window does, whichever it is;
            None or False: no attention.
        mlp: ``"reuse"``: the host block's MLP, once per patch of the window (after ``"cross"``:
            once per merged token); ``"plain"``: 4C -> 4C -> C; None or ``"none"``: no MLP.
        form: Weight form of the reused MLP: ``"dense"``, ``"block"`` or ``"tied"``. Other MLPs have
            one form.
        window: Side f of a window, in tokens.

    Raises:
        TypeError: ``layer`` or ``window`` is not an int.
        ValueError: A value is none of those above, ``layer`` is negative, or cross-attention is
            combined with the plain MLP.
    """

    layer: int = 6
    attention: str | bool | None = "window"
    mlp: str | None = "reuse"
    form: str = "dense"
    window: int = 2

    def __post_init__(self) -> None:
        check_int(self.layer, "layer", 0)
        check_int(self.window, "window", 1)
        put = object.__setattr__
        put(self, "attention", _SAME_ATTENTION.get(self.attention, self.attention))
        put(self, "mlp", None if self.mlp == "none" else self.mlp)
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("mlp", self.mlp, MLPS)
        _check_choice("form", self.form, FORMS)
        if (self.attention, self.mlp) == ("cross", "plain"):
            raise ValueError('mlp must be "reuse" or None with cross-attention, got "plain"')


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Structure of :class:`uhd_ops.nn.WindowTokenCompressor`, a step of progressive compression.

    Args:
        layer: 0-based index of the block after which it runs.
        pool: ``"adaptive"``: the mean of a window weighted channel by channel, by an MLP that reads
            each token and the mean of its window, 2C -> ``hidden_dim`` -> C; ``"mean"``: the mean;
            ``"unshuffle"``: an MLP f²C -> ``hidden_dim`` -> C.
        hidden_dim: Hidden width J of that MLP; None means C.
        window: Side f of a window, in tokens.
        concatenate: Whether ``"adaptive"`` is counted as the released code computes it, with the
            mean beside every token, 3CJ per token; not with one product for each mean, as
            WindowTokenCompressor computes the same, (2 + 1/f²)CJ.

    Raises:
        TypeError: ``layer``, ``hidden_dim`` or ``window`` is not an int.
        ValueError: ``pool`` is none of those, ``layer`` is negative, ``hidden_dim`` or ``window``
            below 1.

    Source:
        LLaVA-UHD v3: windowed token compression.
    """

    layer: int
    pool: str = "adaptive"
    hidden_dim: int | None = None
    window: int = 2
    concatenate: bool = False

    def __post_init__(self) -> None:
        check_int(self.layer, "layer", 0)
        check_int(self.window, "window", 1)
        if self.hidden_dim is not None:
            check_int(self.hidden_dim, "hidden_dim", 1)
        _check_choice("pool", self.pool, POOLS)

    @classmethod
    def progressive(cls, layers: Sequence[int] = (4, 18), **options: Any) -> tuple[PoolConfig, ...]:
        """Return what :func:`uhd_ops.insert_progressive_compression` inserts.

        Args:
            layers: Numbers of blocks in front of each step; indices plus one.
            options: As for the class.

        Example:
            >>> [pool.layer for pool in PoolConfig.progressive((4, 18, 27))]
            [3, 17, 26]
        """
        return tuple(cls(layer - 1, **options) for layer in layers)


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Structure of :class:`uhd_ops.nn.PixelUnshuffleConnector`, behind the encoder.

    Args:
        out_dim: Width of a token of the language model.
        merger_times: Number of stages; each merges windows.
        window: Side f of a window, in tokens.

    Raises:
        TypeError: A value is not an int.
        ValueError: A value is below 1.
    """

    out_dim: int
    merger_times: int = 1
    window: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_int(getattr(self, field.name), field.name, 1)
