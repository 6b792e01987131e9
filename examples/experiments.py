# SPDX-License-Identifier: Apache-2.0
"""What 04_warm_start.py, 05_train_mllm.py and 06_merge_stability.py share.

The random start, and records: where they were measured, their files, tables and plots.

python examples/experiments.py           write the newest results into docs/warm_start.md
python examples/experiments.py --check   fail where the page is out of date
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
from torch import nn

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "warm_start.md"
STARTS = ("reused", "random")
COLOURS = {"reused": "tab:blue", "random": "tab:orange", "": "tab:green"}


def reinitialise(compressor):
    """Initialise as torch does: Linear within ±1 / sqrt(inputs), norms as the identity."""
    for part in compressor.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif getattr(part, "weight", None) is not None:  # a Linear, or fc1 and fc2 of ours
            bound = part.weight.shape[-1] ** -0.5
            for parameter in part.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound)


def environment(*packages, processes):
    """Machine, versions and commit that the numbers of this process belong to."""

    def command(*words):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "logical_cpus": os.cpu_count(),
        "processes": processes,
        "threads_per_process": 1,
        "cpu_isa": uhd_ops._native.cpu_isa(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", *packages)},
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


def write(record, out, name, plot=None):
    """Write a record into the folder ``out``, and its picture; return the paths of the files."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}_{record['environment']['date']}.json"]
    paths[0].write_text(to_json(record))
    if plot is not None:
        paths.append(paths[0].with_suffix(".png"))
        plot(record, paths[1])
    return paths


def series(record, key, unit=1.0):
    """What the rows have under ``key``, by seed: ``{(arm, start): [first, second, ...]}``."""
    found = {}
    for row in sorted(record["rows"], key=lambda row: row["seed"]):
        value = row[key]
        value = [unit * v for v in value] if isinstance(value, list) else unit * value
        found.setdefault((row["arm"], row["start"]), []).append(value)
    return found


def accuracy(record, key="correct"):
    """Counts of test images in %."""
    return series(record, key, 100 / record["settings"]["test_images"])


def mean_and_deviation(values):
    """Mean and sample standard deviation, which one value does not have."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def cell(values, sign="", digits=1):
    """Mean ± standard deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{sign}.{digits}f} ± {deviation:.{digits}f}"


def first_reached(record, seeds, level=90):
    """First measured step at which the mean accuracy is at least ``level`` %."""
    means = [statistics.mean(values) for values in zip(*seeds, strict=True)]
    reached = (step for step, mean in zip(record["steps"], means, strict=True) if mean >= level)
    return str(next(reached, "never"))


def tables(record):
    """Return the tables of a record, and where it was measured, as Markdown."""
    steps, found = record["steps"], accuracy(record)
    readout = accuracy(record, "readable")
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
    lines += ["", "Reused minus random, in percentage points, by pairs of the same seed:", ""]
    lines += [f"| variant | {titles} |", "|---|---:|---:|---:|---:|---:|"]
    for arm in (arm for arm, start in found if start == "reused"):
        columns = [(readout[arm, "reused"], readout[arm, "random"])]
        columns += [[[c[i] for c in found[arm, start]] for start in STARTS] for i in shown]
        lines.append(f"| {' | '.join([arm, *(difference(*pair) for pair in columns)])} |")
    where = measured(record, f"Accuracy in % of {record['settings']['test_images']} test images")
    return "\n".join([*lines, "", where]) + "\n"


def page_tables(record):
    """Return the tables of a record of 05_train_mllm.py, and where it was measured, as Markdown."""
    found, losses = accuracy(record), series(record, "loss")
    tokens = {(row["arm"], row["start"]): row["visual_tokens"] for row in record["rows"]}
    begin, at = 0, {"step 0": 0}
    for name, end in record["ends"].items():
        early = [begin + (end - begin) // n for n in (4, 2)] if end - begin > 100 else []
        at |= {f"{name}, step {step}": step for step in (*early, end)}
        begin = end
    shown = [record["steps"].index(step) for step in at.values()]
    titles, lines = " | ".join(at), []
    for title, values, digits in (("exact", found, 1), ("loss", losses, 3)):
        columns = [*at, "90 % from step"] if values is found else [*at]
        lines += [
            f"| {title} | start | tokens | {' | '.join(columns)} |",
            "|---|---|---:|" + "---:|" * len(columns),
        ]
        for (arm, start), seeds in values.items():
            cells = [cell([curve[i] for curve in seeds], "", digits) for i in shown]
            if values is found:
                cells.append(first_reached(record, seeds))
            lines.append(f"| {' | '.join([arm, start, str(tokens[arm, start]), *cells])} |")
        lines.append("")
    lines += ["Reused minus random, by pairs of the same seed:", ""]
    lines += [f"| | {titles} |", "|---|" + "---:|" * len(at)]
    for title, values, digits in (("exact", found, 1), ("loss", losses, 3)):
        (arm,) = {arm for arm, start in values if start}
        columns = [[[c[i] for c in values[arm, start]] for start in STARTS] for i in shown]
        cells = [difference(*pair, digits) for pair in columns]
        lines.append(f"| {' | '.join([title, *cells])} |")
    pages = record["settings"]["test_images"]
    where = measured(
        record,
        f"*Exact*: test pages without a wrong letter, in % of {pages}; *loss*: of a token of the "
        "answer; *tokens*: visual tokens per page in the decoder",
    )
    layer, inside = record["settings"]["model"]["layer"], record["inside_windows"]
    where += (
        f" Of the variance of the packed patches {100 * inside['patches'][0]:.1f} % is inside the "
        f"windows of 2 x 2, and of that of the tokens after block {layer}, which the compressor "
        f"gets, {cell([100 * x for x in inside['tokens']])} %; unrelated neighbours have 75 %."
    )
    return "\n".join([*lines, "", where]) + "\n"


def difference(reused, random, digits=1):
    return cell([a - b for a, b in zip(reused, random, strict=True)], "+", digits)


def measured(record, what):
    """What, where and with what, in a sentence or two."""
    e = record["environment"]
    changed = " with uncommitted changes" if e["uncommitted_changes"] else ""
    packages = ("python", "torch", "timm", "transformers", "scikit-learn", "pillow")
    versions = ", ".join(f"{name} {e[name]}" for name in packages if name in e)
    processes = "1 process" if e["processes"] == 1 else f"{e['processes']} processes"
    return (
        f"{what}: mean ± standard deviation over {len(record['seeds'])} seeds. Measured "
        f"{e['date']} on {e['logical_cpus']} logical CPUs of an {e['cpu']} ({e['cpu_isa']} "
        f"kernels), {processes} of {e['threads_per_process']} thread, {record['cpu_seconds']} s of "
        f"CPU time; {versions}, commit {e['commit']}{changed}."
    )


def plot(record, path):
    """Draw the recovery curves: one panel per variant, its two starts and the two references."""
    found = accuracy(record)
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


def plot_pages(record, path):
    """Draw the curves of 05_train_mllm.py: accuracy and loss, all arms in each."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for panel, found in ((left, accuracy(record)), (right, series(record, "loss"))):
        for (name, start), seeds in found.items():
            style = {"color": COLOURS[start] if start else "grey"}
            style["linestyle"] = "-" if start else REFERENCES[name.partition(",")[0]]
            _draw(panel, record, seeds, f"{name} {start}", **style)
        for end in record["ends"].values():
            panel.axvline(end, color="lightgrey", linewidth=1)
        panel.legend(fontsize=8)
    left.set_ylabel("pages read exactly, in %")
    left.set_ylim(0, 101)
    right.set_ylabel("loss")
    right.set_yscale("log")
    figure.supxlabel("step of fine-tuning; a stage ends at each vertical line; band: ± 1 std. dev.")
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


EXPERIMENTS = {"warm_start": tables, "train_mllm": page_tables}
"""What makes the tables of each, by the name that its results and its markers in the page have."""


def newest(experiment):
    """Return the committed results with the latest date."""
    return max((ROOT / "benchmarks" / "results").glob(f"{experiment}_????-??-??.json"))


def with_results(page, experiment, path):
    """Return ``page`` with the tables of the results at ``path`` between their markers."""
    begin, end = (f"<!-- {experiment}:{side} -->" for side in ("begin", "end"))
    before, rest = page.split(f"{begin}\n")
    _, after = rest.split(end)
    name, picture = path.relative_to(ROOT), path.with_suffix(".png").relative_to(ROOT)
    text = EXPERIMENTS[experiment](json.loads(path.read_text()))
    block = f"{text}`{name}` has every curve.\n\n![Recovery curves](../{picture})\n"
    return f"{before}{begin}\n{block}{end}{after}"


def with_newest_results(page):
    for experiment in EXPERIMENTS:
        page = with_results(page, experiment, newest(experiment))
    return page


def main():
    page = PAGE.read_text()
    wanted = with_newest_results(page)
    if "--check" in sys.argv[1:]:
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
