# SPDX-License-Identifier: Apache-2.0
"""Write the newest results into the README, so that no number there is typed by hand.

python benchmarks/report.py            rewrite the block between the markers in README.md
python benchmarks/report.py --check    fail if the block is not what the results say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmark:begin -->\n", "<!-- benchmark:end -->"
COPY = "copy of the same bytes"


def newest_results() -> Path:
    """Return the result file with the latest date of measurement."""
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu_*.json"))
    return max(files, key=lambda path: json.loads(path.read_text())["environment"]["date"])


def markdown(path: Path) -> str:
    """Return the table of one result file, and where it was measured."""
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
        f"`{path.relative_to(ROOT)}` has every rival, and `benchmarks/README.md` says how it is "
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


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = before + BEGIN + markdown(newest_results()) + END + after
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
