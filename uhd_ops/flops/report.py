# SPDX-License-Identifier: Apache-2.0
"""The result of a count: one row per layer, and sums."""

from __future__ import annotations

import dataclasses
from typing import Any


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
