# SPDX-License-Identifier: Apache-2.0
"""Draw what ``uhd-ops flops`` counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Published or without compression, computed or with it, and the compressors themselves.
_GREY, _BLUE, _ORANGE = "#b0b0b0", "#1f6fb4", "#e0802b"


def draw_paper(path: Path, result: dict[str, Any]) -> None:
    """Draw every published number beside the computed one, and the corrected totals.

    Args:
        path: PNG file to write.
        result: What ``--json`` prints.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(12, 8))
    rows = result["rows"]
    names = [f"{row['name']} ({row['table']})" for row in rows]
    places = range(len(rows))
    for shift, key, color in ((-0.2, "published", _GREY), (0.2, "computed", _BLUE)):
        values = [row[key] for row in rows]
        bars = top.barh([p + shift for p in places], values, 0.4, color=color, label=key)
        top.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    top.set_yticks(places, names)
    top.set_title("LLaVA-UHD v4, tables 4, 5 and A3: encoder at 980x980 px, 1e9 operations")
    at_980, at_448 = (part["variants"] for part in result["corrected"])
    places = range(len(at_980))
    for shift, variants, color, label in (
        (-0.2, at_980, _BLUE, "980x980 px"),
        (0.2, at_448, _ORANGE, "448x448 px"),
    ):
        values = [100 * v["saved"] for v in variants]
        bars = bottom.barh([p + shift for p in places], values, 0.4, color=color, label=label)
        bottom.bar_label(bars, fmt="%.1f %%", padding=2, fontsize=7)
    bottom.set_yticks(places, [v["name"] for v in at_980])
    bottom.set_title("window attention + reused MLP after layer 6: operations saved, in %")
    for axes in (top, bottom):
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_model(path: Path, result: dict[str, Any]) -> None:
    """Draw the layers of a model with and without compression.

    Args:
        path: PNG file to write.
        result: What ``--json`` prints.
    """
    from matplotlib.figure import Figure

    layers = result["with"]["layers"]
    before = {row["name"]: row["total"] / 1e9 for row in result["without"]["layers"]}
    after = [row["total"] / 1e9 for row in layers]
    places = range(len(layers))
    figure = Figure(figsize=(max(6, 0.32 * len(layers)), 5), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        places, [before.get(row["name"], 0) for row in layers], 0.9, color=_GREY, label="without"
    )
    colors = [_ORANGE if row["name"].startswith("compressor") else _BLUE for row in layers]
    axes.bar(places, after, 0.6, color=colors, label="with compression")
    axes.set_xticks(places, [row["name"] for row in layers], rotation=90)
    axes.set_ylabel("1e9 multiply-accumulates")
    without, with_it = (result[key]["total"] / 1e9 for key in ("without", "with"))
    height, width = result["grid"]
    figure.suptitle(
        f"{result['model']}, {height}x{width} patches\n"
        f"{without:.1f} to {with_it:.1f}, {1 - with_it / without:.1%} saved"
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
