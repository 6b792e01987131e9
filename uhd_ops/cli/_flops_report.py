# SPDX-License-Identifier: Apache-2.0
"""The tables of ``uhd-ops flops``."""

from __future__ import annotations

from typing import Any


def show_paper(result: dict[str, Any]) -> None:
    """Print the paper's numbers, published and computed, and the corrected totals."""
    from rich.console import Console

    console = Console()
    table = _table(
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
        table = _table(
            "window attention + reused MLP, after layer 6",
            numbers=("without", "with", "saved"),
            title=f"{14 * width}x{14 * height} px, 1e9 operations of the encoder",
        )
        for v in part["variants"]:
            table.add_row(v["name"], f"{v['without']:.2f}", f"{v['with']:.2f}", _share(v["saved"]))
        console.print(table)


def show_model(result: dict[str, Any]) -> None:
    """Print the layers of one model with and without the compressor."""
    from rich.console import Console

    height, width = result["grid"]
    print(f"{result['model']}, {height}x{width} patches of {_pixels(result['patch'])} px")
    print(", ".join(f"{name} {_words(value)}" for name, value in result["compressor"].items()))
    table = _table(
        "layer",
        numbers=("tokens", "linear", "attention", "total", "without"),
        title="1e9 multiply-accumulates",
    )
    before = {row["name"]: row["total"] for row in result["without"]["layers"]}
    for row in result["with"]["layers"]:
        counts = row["linear"], row["attention"], row["total"], before.get(row["name"])
        table.add_row(row["name"], str(row["tokens"]), *map(_giga, counts))
    with_it, without = result["with"]["total"], result["without"]["total"]
    table.add_section()
    table.add_row("total", "", "", "", _giga(with_it), _giga(without))
    Console().print(table)
    print(f"saved: {_share(1 - with_it / without)}")


def _table(*words: str, numbers: tuple[str, ...], title: str) -> Any:
    from rich.table import Table

    table = Table(*words, title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _giga(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.3f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _pixels(patch: list[int]) -> str:
    return f"{patch[1]}x{patch[0]}"
