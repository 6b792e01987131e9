# SPDX-License-Identifier: Apache-2.0
"""Write the newest results into README.md and benchmarks/README.md: no number is typed by hand.

python benchmarks/report.py            rewrite the blocks between the markers
python benchmarks/report.py --check    fail if a block is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_all

ROOT = Path(__file__).resolve().parent.parent


def newest(kind: str, root: Path = ROOT) -> Path | None:
    """Return the file of a kind of results, "cpu" or "gpu", with the latest date, or None."""
    files = sorted((root / "benchmarks" / "results").glob(f"{kind}_*.json"))

    def date(path: Path) -> str:
        return json.loads(path.read_text())["environment"]["date"]

    return max(files, key=date, default=None)


KEY_CASES = (
    ("window_attention 2x2 forward + backward", "float32"),
    ("window_attention 2x2 forward + backward", "bfloat16"),
    ("gather + LayerNorm + mean forward", "bfloat16"),
    ("window_mean forward + backward", "float32"),
    ("pixel_unshuffle forward + backward", "float32"),
    ("pixel_unshuffle_mlp dense forward", "float32"),
)
"""What README.md shows: where we win, what is level, and where we lose."""


def cpu_block(path: Path | None, cases: Sequence[tuple[str, str]] | None = None) -> str:
    """Return the table of one result file, of some cases or of all, and where it was measured."""
    if path is None:
        return "CPU: not measured yet.\n"
    record = json.loads(path.read_text())
    rows = {(row["case"], row["dtype"]): row for row in record["rows"]}
    lines = [
        "| case | type | ours | strongest eager alternative | strongest under torch.compile |",
        "|---|---|---:|---:|---:|",
    ]
    for case, dtype in cases or rows:
        row = rows[case, dtype]
        eager, compiled = (_strongest(row, kind) for kind in ("eager", "compiled"))
        lines.append(f"| {case} | {dtype} | {row['ours_ms']:.1f} ms | {eager} | {compiled} |")
    lines += ["", f"Time of the alternative / our time: below 1 we lose. {_measured(record, path)}"]
    return "\n".join(lines) + "\n"


def ttft_block(path: Path | None, image: tuple[int, int] | None = None) -> str:
    """Return the times to the first token, for one size of image (width, height) or for all."""
    if path is None:
        return "Time to first token: not measured yet.\n"
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if image is None or row["image"] == list(image)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lines = [
        f"| image, px | encoder | visual tokens | {' | '.join(dtypes)} |",
        f"|---|---|---:{'|---:' * len(dtypes)}|",
    ]
    for first in (row for row in rows if row["dtype"] == dtypes[0]):
        cells = [" x ".join(map(str, first["image"])), first["way"], str(first["tokens"])]
        for dtype in dtypes:
            (row,) = (
                row
                for row in rows
                if (row["dtype"], row["image"], row["way"]) == (dtype, first["image"], first["way"])
            )
            cells.append(f"{row['first_token_ms']:.0f} ms ({row['ratio']:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "From the pixels to the logits of the first token; in brackets the time / that of the "
        f"early compressor, below 1 we lose. {_measured(record, path)}",
    ]
    return "\n".join(lines) + "\n"


def corpus_block(path: Path | None) -> str:
    """Return what a corpus of images takes, by each way."""
    if path is None:
        return "A corpus: not measured yet.\n"
    record = json.loads(path.read_text())
    lines = ["| way | images per second | of one at a time | peak memory |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        lines.append(
            f"| {row['way']} | {row['images_per_second']:.2f} | {row['ratio']:.2f}x | "
            f"{row['peak_mb'] / 1000:.1f} GB |"
        )
    first = record["rows"][0]
    lines += [
        "",
        f"{first['images']} images, half of 24 megapixels and half of 640 x 480 px; medians of "
        f"{first['rounds']} rounds, torch on one thread, memory of the largest process. "
        f"{_measured(record, path)}",
    ]
    return "\n".join(lines) + "\n"


def _measured(record: dict, path: Path) -> str:
    e = record["environment"]
    return (
        f"Measured {e['date']} on {e['logical_cpus']} logical CPUs of an {e['cpu']} "
        f"({e['cpu_isa']} kernels, {e['threads']} threads), torch {e['torch']}, commit "
        f"{e['commit']}; `benchmarks/results/{path.name}` has every number."
    )


def _strongest(row: dict, kind: str) -> str:
    ratios = {name: ratio for name, ratio in row["ratios"].items() if name.startswith(kind)}
    if not ratios:
        return ""
    name = min(ratios, key=ratios.get)
    detail = name.removeprefix(kind).strip(" ,")
    return f"{ratios[name]:.1f}x" + (f" ({detail})" if detail else "")


def gpu_block(path: Path | None, root: Path = ROOT) -> str:
    """Return the table of one GPU run, or that there was none; never a computed number."""
    if path is None:
        return "GPU: not measured yet.\n"
    record = json.loads(path.read_text())
    e, rows = record["environment"], gpu_all.merged(record["rows"])
    shown = [row for row in rows if row["group"] == "key" and "ours" in row]
    lines = [
        "| case, type, tokens | ours | rate | of the measured ceiling | strongest rival |",
        "|---|---|---|---|---|",
    ]
    for case, us, _, _, _, rate, share, rival, _ in map(gpu_all.cells, shown):
        lines.append(f"| {case} | {us} µs | {rate} | {share} | {rival} |")
    ceilings = " and ".join(f"{most:.0f} {unit}" for unit, most in shown[0]["ceilings"].items())
    lines += [
        "",
        "C = 1152, 16 heads, hidden size 4304. Strongest rival: its time / our time; below 1 we "
        f"lose. The ceilings are a copy and a product in the same run, {ceilings}. Measured "
        f"{e['date']} on an {e['gpu']}, torch {e['torch']}, commit {e['commit']}; "
        f"`{path.relative_to(root)}` has every size, type and rival.",
    ]
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "benchmark": lambda: cpu_block(newest("cpu"), KEY_CASES),
        "first-token": lambda: ttft_block(newest("ttft"), (1344, 1344)),
        "gpu-benchmark": lambda: gpu_block(newest("gpu")),
    },
    "benchmarks/README.md": {
        "cpu": lambda: cpu_block(newest("cpu")),
        "first-token": lambda: ttft_block(newest("ttft")),
        "corpus": lambda: corpus_block(newest("corpus")),
    },
}
"""By file, what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""


def with_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with the block of that name replaced."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + content + end + after


def main() -> int:
    """Rewrite the blocks, or compare them."""
    stale = False
    for name, blocks in BLOCKS.items():
        page = ROOT / name
        text = wanted = page.read_text()
        for block, content in blocks.items():
            wanted = with_block(wanted, block, content())
        stale |= text != wanted
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
    return int(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
