# SPDX-License-Identifier: Apache-2.0
"""Write the newest results into the README, so that no number there is typed by hand.

python benchmarks/report.py            rewrite the blocks between the markers in README.md
python benchmarks/report.py --check    fail if a block is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_all

ROOT = Path(__file__).resolve().parent.parent


def newest(kind: str, root: Path = ROOT) -> Path | None:
    """Return the file of a kind of results, "cpu" or "gpu", with the latest date, or None."""
    files = sorted((root / "benchmarks" / "results").glob(f"{kind}_*.json"))

    def date(path: Path) -> str:
        return json.loads(path.read_text())["environment"]["date"]

    return max(files, key=date, default=None)


def cpu_block(path: Path | None, root: Path = ROOT) -> str:
    """Return the table of one result file, and where it was measured."""
    if path is None:
        return "CPU: not measured yet.\n"
    record = json.loads(path.read_text())
    lines = [
        "| case | dtype | ours | strongest eager rival | strongest compiled rival |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        eager, compiled = (_strongest(row, kind) for kind in ("eager", "compiled"))
        lines.append(
            f"| {row['case']} | {row['dtype']} | {row['ours_ms']:.1f} ms | {eager} | {compiled} |"
        )
    e = record["environment"]
    lines += [
        "",
        "Median of the rounds' ratios, rival's time / our time; below 1 we lose. Measured "
        f"{e['date']} on {e['logical_cpus']} logical CPUs of an {e['cpu']} "
        f"({e['cpu_isa']} kernels, "
        f"{e['threads']} threads), torch {e['torch']}, commit {e['commit']}; "
        f"`{path.relative_to(root)}` has every rival, and `benchmarks/README.md` says how it is "
        "measured.",
    ]
    return "\n".join(lines) + "\n"


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


BLOCKS: dict[str, Callable[[], str]] = {
    "benchmark": lambda: cpu_block(newest("cpu")),
    "gpu-benchmark": lambda: gpu_block(newest("gpu")),
}
"""What stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""


def with_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with the block of that name replaced."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + content + end + after


def main() -> int:
    readme = ROOT / "README.md"
    text = wanted = readme.read_text()
    for name, block in BLOCKS.items():
        wanted = with_block(wanted, name, block())
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
