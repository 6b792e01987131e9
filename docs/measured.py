# SPDX-License-Identifier: Apache-2.0
"""What the site shows of benchmarks/results and of ``uhd_ops.flops``: a page and plots.

They are made when the site is built, so no number there is typed by hand, and none is in docs/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from uhd_ops import flops
from uhd_ops.nn import CompressorConfig
from uhd_ops.plot import BLUE, GREY, ORANGE

ROOT = Path(__file__).resolve().parent.parent
Draw = Callable[[str, Figure], None]

HEAD = """# Benchmarks

This page is written from the files in `benchmarks/results` when the site is built. Each table names
its file, with the machine, the versions and the commit; `benchmarks/README.md` says how it was
measured, and `make bench` measures your machine.
"""


def newest(kind: str, results: Path) -> tuple[str, dict[str, Any]] | None:
    """The name and content of the file of one kind with the latest date; None if there is none."""
    files = [(path.name, json.loads(path.read_text())) for path in results.glob(f"{kind}_*.json")]
    return max(files, key=lambda file: file[1]["environment"]["date"], default=None)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def where_measured(name: str, record: dict[str, Any]) -> str:
    """A sentence about the machine."""
    e = record["environment"]
    return (
        f"Measured {e['date']} on {e['logical_cpus']} logical CPUs of an {e['cpu']} "
        f"({e['cpu_isa']} kernels, threads: {e['threads']}), torch {e['torch']}, commit "
        f"{e['commit']}: `benchmarks/results/{name}`.\n"
    )


def operators(record: dict[str, Any], draw: Draw) -> str:
    """Every operator against every other way to write it in PyTorch."""
    figure = Figure(figsize=(8, 0.32 * len(record["rows"]) + 1), layout="constrained")
    draw_ratios(figure.subplots(), record["rows"])
    draw("operators", figure)
    rows = []
    for row in record["rows"]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        rows.append((row["case"], row["dtype"], f"{row['ours_ms']:.2f}", ratios))
    return (
        "## Operators\n\n70 x 70 tokens of 1152 channels in 16 heads. Numbers behind a name are "
        "its time divided by ours, the median over rounds: above 1 we are faster. The fastest ways "
        "in eager mode and under torch.compile are in the picture.\n\n"
        "![Time of the fastest other way, divided by ours](operators.svg)\n\n"
        + table(("case", "dtype", "ours, ms", "time of the others, divided by ours"), rows)
    )


def draw_ratios(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the lowest ratios of each case, in eager mode and compiled."""
    for kind, color, shift in (("eager", GREY, 0.2), ("compiled", BLUE, -0.2)):
        lowest = [
            min((r for name, r in row["ratios"].items() if name.startswith(kind)), default=0)
            for row in rows
        ]
        places = [-index + shift for index in range(len(rows))]
        axes.barh(places, lowest, 0.4, color=color, label=f"{kind} PyTorch")
    labels = [f"{row['case']}, {row['dtype']}" for row in rows]
    axes.set_yticks([-index for index in range(len(rows))], labels, fontsize=8)
    axes.axvline(1, color=ORANGE, label="ours")
    axes.set_xlabel("time, divided by ours")
    finish(axes)


def host(record: dict[str, Any], draw: Draw) -> str:
    """What happens before the kernels run."""
    groups = list(dict.fromkeys(row["group"] for row in record["rows"]))
    cells = {(row["call"], row["group"]): row for row in record["rows"]}
    rows = [
        (call, *(f"{row['us']:.1f} ({row['ratio']:.2f})" for row in of_call))
        for call in dict.fromkeys(row["call"] for row in record["rows"])
        if (of_call := [cells[call, group] for group in groups])
    ]
    return (
        "## Before the kernels\n\nCPU time of the calling thread for 16 tokens, in "
        "microseconds: what Python and the dispatcher take. In parentheses the same divided by "
        "`scaled_dot_product_attention`; `EarlyCompressor` is divided by timm's block.\n\n"
        + table(("call", *groups), rows)
    )


def tower(record: dict[str, Any], draw: Draw) -> str:
    """The tower of MiniCPM-V 4.6."""
    names = {"merger": "its compressor", "tower": "whole tower"}
    rows = [
        (names[row["case"]], row["views"], row["dtype"], f"{row['ours_ms']:.0f}", f"{ratio:.2f}")
        for row in record["rows"]
        for ratio in row["ratios"].values()
    ]
    return (
        "## MiniCPM-V 4.6\n\nThe vision tower of transformers with "
        "`integrations.transformers.accelerate`, against the same without. The tower is mostly "
        "matrix products, which are torch's in both.\n\n"
        + table(
            ("part", "views", "dtype", "ours, ms", "time of transformers, divided by ours"), rows
        )
    )


def first_token(record: dict[str, Any], draw: Draw) -> str:
    """From pixels to the first token of a language model."""
    rows = [
        (
            f"{row['image'][0]} x {row['image'][1]} px",
            *(row["dtype"], row["way"], row["tokens"], f"{row['encode_ms']:.0f}"),
            *(f"{row['first_token_ms']:.0f}", f"{row['ratio']:.2f}"),
        )
        for row in record["rows"]
    ]
    head = "image", "dtype", "way", "tokens", "encoding, ms", "first token, ms", "divided by ours"
    return (
        "## Time to the first token\n\nFrom the pixels of an image to the logits of the first "
        "token, with random weights.\n\n" + table(head, rows)
    )


def corpora(record: dict[str, Any], draw: Draw) -> str:
    """A folder of images."""
    rows = [
        (
            row["way"],
            f"{row['images_per_second']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['peak_mb']:.0f}",
        )
        for row in record["rows"]
    ]
    head = "way", "images per second", "relative to one at a time", "peak memory, MB"
    return "## A corpus of images\n\n" + table(head, rows)


def growth(record: dict[str, Any], draw: Draw) -> str:
    """A table of bench_scale.py's fitted exponents."""
    rows = []
    for row in record["rows"]:
        sizes = row[row["axis"]]
        largest = sizes[-1] if isinstance(sizes, list) else sizes
        exponents = (row.get(f"{kind}_exponent") for kind in ("time", "memory"))
        cells = ("" if number is None else f"{number:.2f}" for number in exponents)
        rows.append((f"{row['call']} {row['pass']}".strip(), f"{largest:,} {row['axis']}", *cells))
    head = "call", "up to", "exponent of time", "exponent of memory"
    return "## Growth\n\n1 is linear.\n\n" + table(head, rows)


SECTIONS = {
    "cpu": operators,
    "host": host,
    "ttft": first_token,
    "tower": tower,
    "corpus": corpora,
    "scale": growth,
}
TAIL = """## Experiments

Whether a compressor should reuse the weights of its block: docs/warm_start.md. Where tokens can be
merged: docs/stability.md. No result of a GPU is among the files above unless a table says so.
"""


def benchmarks(draw: Draw, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The page over all kinds of results that there are."""
    parts = [HEAD]
    for kind, section in SECTIONS.items():
        found = newest(kind, results)
        if found is not None:
            parts += [section(found[1], draw), where_measured(*found)]
    return "\n".join([*parts, TAIL])


FORMS = {"dense": BLUE, "block": GREY, "tied": ORANGE}


def draw_costs(figure: Figure) -> None:
    """Draw what a compressor costs: over the layer that it follows, and over the resolution."""
    sizes, (left, right) = flops.SIGLIP_SO400M, figure.subplots(1, 2)

    def giga(side: int, **options: Any) -> float:
        return flops.count_vit(sizes, [(side, side)], CompressorConfig(**options)).giga

    for form, color in FORMS.items():
        costs = [giga(32, layers=layer, form=form) for layer in range(sizes.depth)]
        left.plot(costs, color=color, label=form)
    left.axhline(flops.count_vit(sizes, [(32, 32)]).giga, color="black", ls=":", label="without")
    left.set_xlabel("layer: 0-based index of the block before the compressor")
    left.set_title("one view of 448 x 448 px")
    sides = range(16, 81, 4)
    for form, color in FORMS.items():
        shares = [giga(side, form=form) for side in sides]
        right.plot([14 * side for side in sides], shares, color=color, label=form)
    without = [flops.count_vit(sizes, [(side, side)]).giga for side in sides]
    right.plot([14 * side for side in sides], without, color="black", ls=":", label="without")
    right.set_xlabel("side of a view, px")
    right.set_title("after block 6")
    for axes in (left, right):
        axes.set_ylabel("1e9 multiply-accumulates")
        axes.set_ylim(bottom=0)
        finish(axes)


def finish(axes: Axes) -> None:
    """What all plots have in common."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def write(folder: Path) -> None:
    """Write the page and its plots.

    Args:
        folder: Where to.
    """

    def draw(name: str, figure: Figure) -> None:
        # Without a date and with names that are not random, equal plots are equal files.
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})

    folder.mkdir(parents=True, exist_ok=True)
    costs = Figure(figsize=(10, 4), layout="constrained")
    draw_costs(costs)
    draw("costs", costs)
    (folder / "benchmarks.md").write_text(benchmarks(draw))
