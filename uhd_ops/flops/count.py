# SPDX-License-Identifier: Apache-2.0
"""Count the operations of a ViT from its sizes, with or without compressors."""

from __future__ import annotations

from collections.abc import Sequence

from uhd_ops.flops._compressors import COUNTINGS, Counting, compressor_row
from uhd_ops.flops.config import ConnectorConfig, ViTConfig
from uhd_ops.flops.report import FlopReport, LayerCount, compressor_names
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.early_compressor import CompressorConfig


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
        compressor: What is inserted, or several of that behind different blocks; None for an
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
        ValueError: ``counting`` is unknown, a compressor's layer is no block of the encoder, or two
            have the same.

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
