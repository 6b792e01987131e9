# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops flops --paper``: the numbers of LLaVA-UHD v4 and v3, published and computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uhd_ops import flops, plot
from uhd_ops.cli._support import new_table, share
from uhd_ops.flops.paper import RECIPE_GRID, STATED_GRID

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- LLaVA-UHD v4 --------------------------------------------------------------------------------


def _v4() -> dict[str, Any]:
    """Tables 4, 5 and A3, published and computed, and the corrected totals."""
    return {
        "rows": [
            {
                "table": row.table,
                "name": row.name,
                "published": row.published,
                "computed": row.computed,
                "difference": row.difference,
            }
            for row in flops.PAPER_ROWS
        ],
        "corrected": [
            {
                "grid": list(grid),
                "variants": [
                    {"name": v.name, "without": v.without, "with": v.giga, "saved": v.saved}
                    for v in flops.paper_totals(grid)
                ],
            }
            for grid in (STATED_GRID, RECIPE_GRID)
        ],
    }


def _show_v4(result: dict[str, Any]) -> None:
    """Print the numbers of v4, published and computed, and the corrected totals."""
    from rich.console import Console

    console = Console()
    table = new_table(
        "table",
        "LLaVA-UHD v4, 980x980 px",
        numbers=("published", "computed", "difference"),
        title="1e9 operations of the encoder, by the paper's counting",
    )
    previous = None
    for row in result["rows"]:
        if previous not in (None, row["table"]):
            table.add_section()
        previous = row["table"]
        numbers = f"{row['published']:.1f}", f"{row['computed']:.3f}", f"{row['difference']:+.3f}"
        table.add_row(row["table"], row["name"], *numbers)
    console.print(table)
    for part in result["corrected"]:
        height, width = part["grid"]
        table = new_table(
            "window attention + reused MLP, after layer 6",
            numbers=("without", "with", "saved"),
            title=f"{14 * width}x{14 * height} px, 1e9 operations of the encoder",
        )
        for v in part["variants"]:
            table.add_row(v["name"], f"{v['without']:.2f}", f"{v['with']:.2f}", share(v["saved"]))
        console.print(table)


def _draw_v4(result: dict[str, Any], figure: Figure) -> None:
    """Draw how far published and computed numbers are apart, and the corrected totals."""
    figure.set_size_inches(11, 9)
    figure.set_layout_engine("constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(12, 8))
    top.suptitle("LLaVA-UHD v4, tables 4, 5 and A3: encoder at 980x980 px")
    rows = [
        (f"{row['name']} ({row['table']})", row["published"], row["computed"])
        for row in result["rows"]
    ]
    plot.agreement(rows, rounding=0.05, unit="1e9 operations", figure=top)
    axes = bottom.subplots()
    names = [variant["name"] for variant in result["corrected"][0]["variants"]]
    sizes = [f"{14 * w}x{14 * h} px" for h, w in (part["grid"] for part in result["corrected"])]
    saved = [[100 * v["saved"] for v in part["variants"]] for part in result["corrected"]]
    plot.bars(
        names,
        dict(zip(sizes, saved, strict=True)),
        texts={size: [f"{n:.1f} %" for n in s] for size, s in zip(sizes, saved, strict=True)},
        colors=dict(zip(sizes, (plot.BLUE, plot.ORANGE), strict=True)),
        axes=axes,
    )
    axes.set_title("window attention + reused MLP after layer 6: operations saved, in %")


# ---- LLaVA-UHD v3 --------------------------------------------------------------------------------

_SIDE = 1024
_TITLE = f"LLaVA-UHD v3, {_SIDE}x{_SIDE} px: finer patches and merges inside the encoder"
_NOTES = (
    "Computed: patch embedding, blocks and pooling of a tower of MoonViT's sizes, without a "
    "connector, the sides of the image rounded down to whole windows; as the released code pools, "
    "with the mean of its window beside every token, and as uhd_ops does, with one product for "
    "each mean.",
    "Published: only the numbers of tokens above; they are the area over 1600, without rounding to "
    "windows. No number of operations is published, so none is compared. That ViT-UHD is 2.4 times "
    "as fast as MoonViT at 1024 px is a measured time.",
    '"5-19" is the other way to read the released "4-18": its code compares indices that count '
    "from 0.",
)


def _v3() -> dict[str, Any]:
    """What each patch and each list of merges costs, and the published numbers of tokens."""
    rows = flops.v3_rows(_SIDE)
    moonvit = rows[0].released
    tokens = {
        side: next(r for r in flops.v3_rows(side) if (r.patch, r.merges) == (10, "4-18"))
        for side in flops.PUBLISHED_TOKENS
    }
    return {
        "side": _SIDE,
        "rows": [
            {
                "encoder": "MoonViT" if row is rows[0] else "refined" if row.patch < 16 else "base",
                "patch": row.patch,
                "merges": row.merges,
                "layers": list(row.layers),
                "grid": list(row.grid),
                "tokens": row.tokens,
                "merged_tokens": row.merged_tokens,
                "released": row.released,
                "uhd_ops": row.computed,
                "of_moonvit": row.released / moonvit,
            }
            for row in rows
        ],
        "tokens": [
            {
                "side": side,
                "published": published,
                "computed": tokens[side].merged_tokens,
                "difference": tokens[side].merged_tokens - published,
            }
            for side, published in flops.PUBLISHED_TOKENS.items()
        ],
        "notes": list(_NOTES),
    }


def _show_v3(result: dict[str, Any]) -> None:
    """Print what is computed, what is published, and which is which."""
    from rich.console import Console

    console = Console()
    table = new_table(
        "patch",
        "merged after",
        numbers=("tokens in", "out", "as released", "uhd_ops", "of MoonViT"),
        title=f"{_TITLE}\n1e9 multiply-accumulates, computed",
    )
    previous = result["rows"][0]["patch"]
    for row in result["rows"]:
        if row["patch"] != previous:
            table.add_section()
        previous = row["patch"]
        table.add_row(
            _patch(row),
            row["merges"],
            str(row["tokens"]),
            str(row["merged_tokens"]),
            f"{row['released']:.1f}",
            f"{row['uhd_ops']:.1f}",
            share(row["of_moonvit"]),
        )
    console.print(table)
    table = new_table(
        numbers=("side, px", "published", "computed", "difference"),
        title="tokens that ViT-UHD (patches of 10 px, 4-18) hands on",
    )
    for row in result["tokens"]:
        numbers = row["side"], row["published"], row["computed"]
        table.add_row(*map(str, numbers), f"{row['difference']:+d}")
    console.print(table)
    for note in result["notes"]:
        console.print(note, markup=False, highlight=False)


def _patch(row: dict[str, Any]) -> str:
    names = {"MoonViT": "MoonViT, 14", "base": "16"}
    return names.get(row["encoder"], f"16 to {row['patch']}")


def _draw_v3(result: dict[str, Any], figure: Figure) -> None:
    """Draw what every encoder costs, beside what it hands on."""
    figure.set_size_inches(11, 6)
    figure.set_layout_engine("constrained")
    rows = result["rows"]
    colors = {"MoonViT": plot.GREY, "base": plot.BLUE, "refined": plot.ORANGE}
    panels = (("released", "1e9 multiply-accumulates"), ("merged_tokens", "tokens handed on"))
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        values = [row[key] for row in rows]
        plot.bars(
            [f"{_patch(row)} px, merges: {row['merges']}" for row in rows],
            {title: values},
            texts={title: [f"{value:.0f}" for value in values]},
            colors={title: [colors[row["encoder"]] for row in rows]},
            axes=axes,
        )
        axes.set_title(title)
        axes.label_outer()
    figure.suptitle(f"{_TITLE}; computed, not published")


PAPERS = {"v4": (_v4, _show_v4, _draw_v4), "v3": (_v3, _show_v3, _draw_v3)}
"""What ``--json`` prints of a paper, and what prints and draws that."""
