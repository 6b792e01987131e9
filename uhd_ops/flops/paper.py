# SPDX-License-Identifier: Apache-2.0
"""The operations that LLaVA-UHD v4 states, computed, and corrected."""

from __future__ import annotations

import dataclasses

from uhd_ops.flops.count import SIGLIP_SO400M, count_vit
from uhd_ops.grids import Grids
from uhd_ops.nn.early_compressor import CompressorConfig

STATED_GRID = (70, 70)
"""980x980 px, for which the paper states its numbers."""
RECIPE_GRID = (32, 32)
"""448x448 px, about the size of a slice in the paper's recipe."""


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One row of a table of LLaVA-UHD v4.

    Attributes:
        table: The tables it stands in.
        name: What it compares.
        compressor: Its compressor; None for the baseline, which merges tokens after the encoder.
        published: Operations of the encoder in units of 1e9, as published.
    """

    table: str
    name: str
    compressor: CompressorConfig | None
    published: float

    @property
    def computed(self) -> float:
        """The same number by ``count_vit(..., counting="paper")``."""
        report = count_vit(SIGLIP_SO400M, [STATED_GRID], self.compressor, counting="paper")
        return report.giga

    @property
    def difference(self) -> float:
        """Computed minus published."""
        return self.computed - self.published


_VARIANTS, _LAYERS = "4, A3", "5"
PAPER_ROWS = (
    PaperRow(_VARIANTS, "post-ViT baseline", None, 3555.1),
    PaperRow(_VARIANTS, "average pool", CompressorConfig(attention="none", mlp="none"), 1368.7),
    PaperRow(
        _VARIANTS, "pixel-unshuffle MLP", CompressorConfig(attention="none", mlp="plain"), 1401.2
    ),
    PaperRow(_VARIANTS, "reused MLP", CompressorConfig(attention="none"), 1490.2),
    PaperRow(
        _VARIANTS,
        "cross-attention, top-left query",
        CompressorConfig(attention="cross_top_left"),
        1402.0,
    ),
    PaperRow(
        _VARIANTS, "cross-attention, mean query", CompressorConfig(attention="cross_mean"), 1402.0
    ),
    PaperRow(_VARIANTS, "window attention + MLP", CompressorConfig(mlp="plain"), 1484.1),
    PaperRow(_VARIANTS, "window attention + reused MLP", CompressorConfig(), 1573.1),
    PaperRow(_LAYERS, "after layer 3", CompressorConfig(layers=3), 1245.1),
    PaperRow(_LAYERS, "after layer 6", CompressorConfig(layers=6), 1573.1),
    PaperRow(_LAYERS, "after layer 9", CompressorConfig(layers=9), 1901.1),
    PaperRow(_LAYERS, "after layer 15", CompressorConfig(layers=15), 2557.0),
)
"""Every published number, in the order of the tables."""


@dataclasses.dataclass(frozen=True)
class PaperTotal:
    """The paper's compressor, window attention + reused MLP, counted in one way.

    Attributes:
        name: What is counted, and how.
        giga: Operations of the encoder with it, in units of 1e9.
        without: Those of the encoder without it, counted likewise.
    """

    name: str
    giga: float
    without: float

    @property
    def saved(self) -> float:
        """Share of the operations that the compressor saves."""
        return 1 - self.giga / self.without


def paper_totals(grids: Grids) -> tuple[PaperTotal, ...]:
    """Count the paper's compressor as the paper does, and as it runs.

    The paper counts the attention inside windows as attention over the whole view, and weights that
    start as zeros as multiplications. The forms ``"block"`` and ``"tied"`` leave those out.

    Args:
        grids: Grids of the views: ``(70, 70)`` as the paper states its numbers, ``(32, 32)`` for
            448x448 px.

    Returns:
        The ways of counting, first the paper's.

    Raises:
        TypeError: ``grids`` has no accepted form.

    Example:
        >>> as_published, *_, macs_tied = paper_totals((70, 70))
        >>> f"{as_published.saved:.1%} {macs_tied.saved:.1%}"
        '55.8% 59.8%'
    """
    ways = (
        ("as published", "paper", True, "dense"),
        ("true windows", "paper", False, "dense"),
        ("true windows, block form", "paper", False, "block"),
        ("true windows, tied form", "paper", False, "tied"),
        ("plain MACs", "macs", False, "dense"),
        ("plain MACs, block form", "macs", False, "block"),
        ("plain MACs, tied form", "macs", False, "tied"),
    )
    variants = []
    for name, counting, full, form in ways:
        with_it, without = (
            count_vit(
                SIGLIP_SO400M,
                grids,
                compressor,
                counting=counting,
                full_window_attention=full,
            ).giga
            for compressor in (CompressorConfig(form=form), None)
        )
        variants.append(PaperTotal(name, with_it, without))
    return tuple(variants)
