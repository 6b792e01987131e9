# SPDX-License-Identifier: Apache-2.0
"""Count the operations of a ViT from its sizes, with or without compressors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from uhd_ops._checks import check_int
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.attention import QUERIES
from uhd_ops.nn.early_compressor import CompressorConfig


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
class ConnectorConfig:
    """Structure of :class:`uhd_ops.nn.PixelUnshuffleConnector`, after the encoder.

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


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """Operations of one layer, a multiply-accumulate counted as one.

    Attributes:
        name: ``patch_embed``, ``blocks.<i>``, ``compressor`` and others; see what returns the
            report.
        tokens: Tokens that enter the layer: prefix tokens too where they do.
        linear: Products with weights.
        attention: Products of attention: queries with keys, probabilities with values.
        elementwise: Everything else; 0 when only MACs are counted.
    """

    name: str
    tokens: int
    linear: int
    attention: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        """Sum of the three columns."""
        return self.linear + self.attention + self.elementwise


@dataclasses.dataclass(frozen=True)
class FlopReport:
    """Operations of one forward pass, layer by layer.

    Attributes:
        layers: One row per layer, in the order in which they run.
        counting: How it was counted: ``"macs"`` or ``"paper"``.
    """

    layers: tuple[LayerCount, ...]
    counting: str

    @property
    def total(self) -> int:
        """Operations of all layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def giga(self) -> float:
        """``total`` in units of 1e9."""
        return self.total / 1e9

    def __getitem__(self, name: str) -> LayerCount:
        """Return the row of the layer called ``name``; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return counts as a dict of ints and strings, ready for JSON."""
        rows = [{**dataclasses.asdict(layer), "total": layer.total} for layer in self.layers]
        return {"counting": self.counting, "total": self.total, "layers": rows}

    def table(self) -> str:
        """Return the rows as text, in units of 1e9 operations."""
        width = max(14, *(len(layer.name) + 2 for layer in self.layers))
        lines = [
            f"{'layer':<{width}}{'tokens':>8}{'linear':>12}{'attention':>12}"
            f"{'elementwise':>13}{'total':>12}"
        ]
        for layer in self.layers:
            counts = (layer.linear, layer.attention, layer.elementwise, layer.total)
            linear, attention, elementwise, total = (f"{count / 1e9:.4f}" for count in counts)
            lines.append(
                f"{layer.name:<{width}}{layer.tokens:>8}{linear:>12}{attention:>12}"
                f"{elementwise:>13}{total:>12}"
            )
        lines.append(f"{'total':<{width + 45}}{self.giga:>12.4f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def compressor_names(count: int) -> list[str]:
    """Names of the rows of ``count`` compressors, in the order in which they run."""
    return ["compressor"] if count == 1 else [f"compressors.{index}" for index in range(count)]


def count_vit(
    vit: ViTConfig,
    grids: Grids,
    compressor: CompressorConfig | Sequence[CompressorConfig] | None = None,
    *,
    connector: ConnectorConfig | None = None,
    counting: str = "macs",
    full_window_attention: bool | None = None,
    concatenate: bool = False,
) -> FlopReport:
    """Count the operations of one forward pass over packed views.

    From the patch embedding to the last block, and the connector if there is one; every view
    attends inside itself only. Position embeddings, the final norm, and any head are left out, as
    in the paper.

    Args:
        vit: Sizes of the encoder.
        grids: Patch grids of the views, in any accepted form.
        compressor: What is inserted, or several of that after different blocks; None for an
            encoder without compressors.
        connector: Structure of the connector to the language model; None to leave it out, as the
            papers do.
        counting: ``"macs"`` for the matrix products only, ``"paper"`` for the counting of LLaVA-UHD
            v4.
        full_window_attention: Count the window attention as attention over the whole view. None
            means what the counting is known for: True for ``"paper"``, False for ``"macs"``.
        concatenate: Count adaptive pooling as the released code computes it, with the mean beside
            every token, 3CJ per token; not with one product for each mean, as
            :class:`uhd_ops.nn.WindowTokenCompressor` computes the same, (2 + 1/f²)CJ.

    Returns:
        Rows ``patch_embed``, ``blocks.0`` ... and ``compressor`` after the block that it follows
        (``compressors.0`` ... where there are several), then ``connector``.

    Raises:
        TypeError: ``grids`` has no accepted form.
        ValueError: ``counting`` is unknown, the encoder lacks a compressor's layer, or two have the
            same.

    Source:
        LLaVA-UHD v4, tables 4 and 5; the operations per element were fitted to them.

    Example:
        >>> report = count_vit(
        ...     SIGLIP_SO400M, [(72, 72)], CompressorConfig((3, 17), pool="adaptive")
        ... )
        >>> [report[name].tokens for name in ("blocks.3", "blocks.4", "blocks.18")]
        [5184, 1296, 324]
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting must be one of {tuple(COUNTINGS)}, got {counting!r}")
    behind = _by_layer(vit, compressor)
    names = dict(zip(sorted(behind), compressor_names(len(behind)), strict=True))
    if full_window_attention is None:
        full_window_attention = counting == "paper"
    per = COUNTINGS[counting]
    grids = PackedGrids.of(grids)
    patch_embed = grids.num_tokens * vit.dim * vit.in_channels * vit.patch**2
    layers = [LayerCount("patch_embed", grids.num_tokens, patch_embed)]
    for index in range(vit.depth):
        layers.append(_block(f"blocks.{index}", vit, grids, per))
        if index in behind:
            config = behind[index]
            layers.append(
                compressor_row(
                    names[index], vit, grids, config, per, full_window_attention, concatenate
                )
            )
            grids = grids.merged(config.window)
    if connector is not None:
        layers.append(_connector(vit, grids, connector, per))
    return FlopReport(tuple(layers), counting)


def _by_layer(
    vit: ViTConfig, compressor: CompressorConfig | Sequence[CompressorConfig] | None
) -> dict[int, CompressorConfig]:
    """Check the compressors; return them by layer."""
    if compressor is None:
        return {}
    single = isinstance(compressor, CompressorConfig)
    by_layer = {}
    for index, config in enumerate([compressor] if single else compressor):
        name = "compressor" if single else f"compressor[{index}]"
        if not isinstance(config, CompressorConfig):
            raise TypeError(f"{name} must be a CompressorConfig, got {type(config).__name__}")
        if config.layers[-1] >= vit.depth:
            raise ValueError(
                f"{name}.layers must be below the depth of the encoder, {vit.depth}, "
                f"got {config.layers}"
            )
        if not by_layer.keys().isdisjoint(config.layers):
            raise ValueError(f"{name}.layers must differ from those before, got {config.layers}")
        by_layer.update(dict.fromkeys(config.layers, config))
    return by_layer


def _block(name: str, vit: ViTConfig, grids: PackedGrids, per: Counting) -> LayerCount:
    views = [height * width + vit.prefix_tokens for height, width in grids]
    tokens, pairs = sum(views), sum(n * n for n in views)
    dim, hidden = vit.dim, vit.mlp_hidden
    return LayerCount(
        name,
        tokens,
        linear=tokens * (4 * dim * dim + 2 * dim * hidden),
        attention=2 * pairs * dim,
        elementwise=per.score * pairs * vit.heads
        + per.activation * tokens * hidden
        + 2 * (per.norm + per.addition) * tokens * dim,
    )


def _connector(
    vit: ViTConfig, grids: PackedGrids, connector: ConnectorConfig, per: Counting
) -> LayerCount:
    entering, linear, elementwise = grids.num_tokens, 0, 0
    wide = connector.window**2 * vit.dim
    for width in (*(vit.dim,) * (connector.merger_times - 1), connector.out_dim):
        grids = grids.merged(connector.window)
        linear += grids.num_tokens * (wide * wide + wide * width)
        elementwise += grids.num_tokens * (per.norm + per.activation) * wide
    return LayerCount("connector", entering, linear, elementwise=elementwise)


# ---- what the kinds of compressors cost ----------------------------------------------------------


class Counting(NamedTuple):
    """Operations per element beside the matrix products."""

    score: int  # scale and softmax, per head and per pair of query and key
    norm: int
    activation: int
    addition: int  # of residuals and of the mean over a window


# Several neighbouring choices of norm, activation and addition fit the paper's ten totals after
# rounding; the four operations per score are common to all that do.
COUNTINGS = {"macs": Counting(0, 0, 0, 0), "paper": Counting(4, 5, 1, 1)}


def compressor_row(
    name: str,
    vit: ViTConfig,
    grids: PackedGrids,
    config: CompressorConfig,
    per: Counting,
    full_window_attention: bool,
    concatenate: bool,
) -> LayerCount:
    """Count one compressor of the patches on ``grids``; prefix tokens do not enter it."""
    if config.pool is not None:
        return _pool(name, vit, grids, config, per, concatenate)
    merged = grids.num_windows(config.window)
    attend = _cross_attention if config.attention in QUERIES else _ATTENTIONS[config.attention]
    linear, attention, elementwise = attend(vit, grids, config.window, per, full_window_attention)
    mlp_linear, mlp_elementwise = _mlp(vit, merged, config, per)
    if config.attention not in QUERIES:
        elementwise += per.addition * grids.num_tokens * vit.dim  # the mean over each window
    return LayerCount(
        name, grids.num_tokens, linear + mlp_linear, attention, elementwise + mlp_elementwise
    )


def window_pairs(grids: PackedGrids, window: int) -> int:
    """Pairs of query and key over all windows, ragged ones included."""
    return sum(_squares(height, window) * _squares(width, window) for height, width in grids)


def _squares(side: int, window: int) -> int:
    full, rest = divmod(side, window)
    return full * window**2 + rest**2


def _pool(
    name: str,
    vit: ViTConfig,
    grids: PackedGrids,
    config: CompressorConfig,
    per: Counting,
    concatenate: bool,
) -> LayerCount:
    tokens, merged, dim = grids.num_tokens, grids.num_windows(config.window), vit.dim
    hidden = dim if config.hidden_dim is None else config.hidden_dim
    if config.pool == "mean":
        linear, elementwise = 0, tokens * per.addition * dim
    elif config.pool == "unshuffle":
        linear = merged * (config.window**2 * dim * hidden + hidden * dim)
        elementwise = merged * per.activation * hidden
    else:
        means = tokens if concatenate else merged
        linear = (2 * tokens + means) * dim * hidden
        # Each token is one weight per channel: a score, and a term of the mean and of the result.
        elementwise = tokens * (per.activation * hidden + (per.score + 2 * per.addition) * dim)
    return LayerCount(name, tokens, linear, elementwise=elementwise)


def _no_attention(*_: object) -> tuple[int, int, int]:
    return 0, 0, 0


def _window_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: Counting, full: bool
) -> tuple[int, int, int]:
    tokens = grids.num_tokens
    if full:
        pairs = sum((height * width) ** 2 for height, width in grids)
    else:
        pairs = window_pairs(grids, window)
    elementwise = per.score * pairs * vit.heads + (per.norm + per.addition) * tokens * vit.dim
    return 4 * tokens * vit.dim**2, 2 * pairs * vit.dim, elementwise


_ATTENTIONS = {"none": _no_attention, "window": _window_attention}


def _cross_attention(
    vit: ViTConfig, grids: PackedGrids, window: int, per: Counting, full: bool
) -> tuple[int, int, int]:
    # Queries, keys and values of all tokens, one query per window: the only split that fits the
    # paper's total. Keys that a ragged window lacks are masked, not skipped.
    tokens, merged = grids.num_tokens, grids.num_windows(window)
    pairs = merged * window**2
    elementwise = per.score * pairs * vit.heads
    elementwise += (per.norm * tokens + per.addition * merged) * vit.dim
    return (3 * tokens + merged) * vit.dim**2, 2 * pairs * vit.dim, elementwise


def _mlp(vit: ViTConfig, merged: int, config: CompressorConfig, per: Counting) -> tuple[int, int]:
    if config.mlp == "none":
        return 0, 0
    cells = config.window**2  # tokens of a window; ragged windows repeat theirs to fill it
    dim, wide = vit.dim, cells * vit.dim
    if config.mlp == "plain":
        linear, hidden = wide * wide + wide * dim, wide
    elif config.attention in QUERIES:
        linear, hidden, wide = 2 * dim * vit.mlp_hidden, vit.mlp_hidden, dim
    else:
        hidden = cells * vit.mlp_hidden
        linear = _reused_mlp(dim, vit.mlp_hidden, cells)[config.form]
    elementwise = per.norm * wide + per.activation * hidden + per.addition * dim
    return merged * linear, merged * elementwise


def _reused_mlp(dim: int, hidden: int, cells: int) -> dict[str, int]:
    """MACs per merged token: fc1, then fc2; the tied form averages before its fc2."""
    one = dim * hidden
    return {
        "dense": cells * cells * one + cells * one,
        "block": cells * one + cells * one,
        "tied": cells * one + one,
    }
