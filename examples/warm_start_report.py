# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of what 04_warm_start.py recorded.

python examples/warm_start_report.py           write the newest results into docs/warm_start.md
python examples/warm_start_report.py --check   fail where the page is out of date
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "warm_start.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
COLOURS = {"reused": "tab:blue", "random": "tab:orange", "": "tab:green"}


def environment():
    """Machine, versions and commit that the numbers of this process belong to."""

    def command(*words):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    packages = ("torch", "timm", "scikit-learn", "numpy")
    return {
        "cpu": model[1] if model else platform.processor(),
        "logical_cpus": os.cpu_count(),
        "processes": 2,
        "threads_per_process": 1,
        "cpu_isa": uhd_ops._native.cpu_isa(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "uhd_ops": uhd_ops.__version__,
        "commit": command("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(command("git", "status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
    }


def to_json(record):
    """One line for each curve."""
    head = {key: value for key, value in record.items() if key != "rows"}
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n'


def curves(record):
    """Accuracy in %, one list of steps for each seed: ``{(arm, start): [[...], ...]}``."""
    found = {}
    for row in sorted(record["rows"], key=lambda row: row["seed"]):
        accuracy = [100 * n / record["settings"]["test_images"] for n in row["correct"]]
        found.setdefault((row["arm"], row["start"]), []).append(accuracy)
    return found


def mean_and_deviation(values):
    """Mean and sample standard deviation, which one value does not have."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def cell(values, sign=""):
    """Mean ± standard deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.1f} ± {deviation:.1f}"


def first_reached(record, seeds, level=90):
    """First measured step at which the mean accuracy is at least ``level`` %."""
    means = [statistics.mean(values) for values in zip(*seeds, strict=True)]
    reached = (step for step, mean in zip(record["steps"], means, strict=True) if mean >= level)
    return str(next(reached, "never"))


def readable(record):
    """Accuracy in % of the readout at step 0, one for each seed: ``{(arm, start): [...]}``."""
    found = {}
    for row in sorted(record["rows"], key=lambda row: row["seed"]):
        accuracy = 100 * row["readable"] / record["settings"]["test_images"]
        found.setdefault((row["arm"], row["start"]), []).append(accuracy)
    return found


def tables(record):
    """Return the tables of a record, and where it was measured, as Markdown."""
    steps, found, readout = record["steps"], curves(record), readable(record)
    shown = [0, 1, steps.index(record["stage_2_from_step"]), len(steps) - 1]
    titles = ["readout, step 0", "step 0", f"step {steps[1]}"]
    titles += [
        f"stage {stage}, step {steps[i]}" for stage, i in zip((1, 2), shown[2:], strict=True)
    ]
    titles = " | ".join(titles)
    lines = [
        f"| variant | start | {titles} | 90 % from step |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (arm, start), seeds in found.items():
        cells = [cell(readout[arm, start])]
        cells += [cell([curve[i] for curve in seeds]) for i in shown]
        lines.append(f"| {' | '.join([arm, start, *cells, first_reached(record, seeds)])} |")
    lines += [
        "",
        "Reused minus random, in percentage points, by pairs of the same seed:",
        "",
        f"| variant | {titles} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm in (arm for arm, start in found if start == "reused"):
        starts = [(arm, "reused"), (arm, "random")]
        cells = [_difference(*(readout[key] for key in starts))]
        cells += [_difference(*([c[i] for c in found[key]] for key in starts)) for i in shown]
        lines.append(f"| {' | '.join([arm, *cells])} |")
    return "\n".join([*lines, "", measured(record)]) + "\n"


def _difference(reused, random):
    return cell([a - b for a, b in zip(reused, random, strict=True)], "+")


def measured(record):
    """Where and with what, in a sentence."""
    e = record["environment"]
    changed = " with uncommitted changes" if e["uncommitted_changes"] else ""
    versions = ", ".join(
        f"{name} {e[name]}" for name in ("python", "torch", "timm", "scikit-learn")
    )
    return (
        f"Accuracy in % of {record['settings']['test_images']} test images: mean ± standard "
        f"deviation over {len(record['seeds'])} seeds. Measured {e['date']} on "
        f"{e['logical_cpus']} logical CPUs of an {e['cpu']} ({e['cpu_isa']} kernels), "
        f"{e['processes']} processes of {e['threads_per_process']} thread, "
        f"{record['cpu_seconds']} s of CPU time; {versions}, commit {e['commit']}{changed}."
    )


def plot(record, path):
    """Draw the recovery curves: one panel per variant, its two starts and the two references."""
    found = curves(record)
    names = [name for name in dict.fromkeys(arm for arm, _ in found) if name not in REFERENCES]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for panel, name in zip(panels.flat, names, strict=True):
        for reference, style in REFERENCES.items():
            _draw(panel, record, found[reference, ""], reference, color="grey", linestyle=style)
        for start, colour in COLOURS.items():
            if (name, start) in found:
                _draw(panel, record, found[name, start], start or "no parameters", color=colour)
        panel.axvline(record["stage_2_from_step"], color="lightgrey", linewidth=1)
        panel.set_title(name, fontsize=10)
        panel.set_ylim(0, 101)
        panel.legend(fontsize=7, loc="lower right")
    figure.supxlabel("step of fine-tuning; stage 2 starts at the vertical line")
    figure.supylabel("test accuracy in %; band: ± 1 standard deviation over seeds")
    figure.savefig(path, dpi=90)


REFERENCES = {"untouched": ":", "post-ViT": "--"}
"""Arms that every panel shows, and their line styles."""


def _draw(panel, record, seeds, label, **style):
    at_step = [mean_and_deviation(values) for values in zip(*seeds, strict=True)]
    means = [mean for mean, _ in at_step]
    panel.plot(record["steps"], means, label=label, linewidth=1.2, **style)
    if len(seeds) > 1:
        low, high = ([mean + side * sd for mean, sd in at_step] for side in (-1, 1))
        panel.fill_between(record["steps"], low, high, color=style["color"], alpha=0.2, linewidth=0)


def newest():
    """Return the committed results with the latest date."""
    return max((ROOT / "benchmarks" / "results").glob("warm_start_*.json"))


def with_results(page, path):
    """Return ``page`` with the tables of the results at ``path`` between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    name, picture = path.relative_to(ROOT), path.with_suffix(".png").relative_to(ROOT)
    text = tables(json.loads(path.read_text()))
    block = f"{text}`{name}` has every curve.\n\n![Recovery curves](../{picture})\n"
    return before + BEGIN + block + END + after


def main():
    page = PAGE.read_text()
    wanted = with_results(page, newest())
    if "--check" in sys.argv[1:]:
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
