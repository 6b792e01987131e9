# SPDX-License-Identifier: Apache-2.0
"""The stages that measure, and what is left at the end: one result file and one table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from gpu import profiling, rows, table
from gpu.cases import all_cases
from gpu.stages import (
    NOT_RUN,
    Details,
    FailedError,
    NotRunError,
    OverranError,
    Record,
    write_atomically,
)
from gpu.steps import Workplace

STOP_EARLY_S = 8.0  # before its deadline the benchmark stops by itself, with whole rows
PRINTED_ROWS = 40  # some terminals keep the end of the output only
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats")


def bench(place: Workplace, seconds: float) -> Details:
    """Measure until the deadline; a process that lost the device is followed by another."""
    path = place.out / "rows.jsonl"
    path.unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        # A time of day, because the seconds until torch is imported count as well.
        until = time.time() + left - STOP_EARLY_S
        command = (sys.executable, "benchmarks/bench_gpu.py", "--out", path, "--until", str(until))
        done = place.run(*command, seconds=left)
        if done.returncode != rows.LOST_DEVICE or deadline - time.monotonic() < 2 * STOP_EARLY_S:
            break
    found, _ = rows.read(path)
    measured = {row["case"] for row in found}
    missing = [case.name for case in all_cases() if case.name not in measured]
    details = {"rows": found, "not_reached": missing}
    wrong = [f"{row['case']}: {row['error']}" for row in found if "ours" not in row]
    if done.overran:
        raise OverranError(f"killed after {done.seconds:.0f} s", tail=done.tail(), **details)
    if wrong:
        raise FailedError(f"{len(wrong)} cases failed, first {wrong[0]}", **details)
    if done.returncode != 0 or not found:
        raise FailedError(f"exit code {done.returncode}", tail=done.tail(), **details)
    return details


def ncu(place: Workplace, seconds: float) -> Details:
    tool = place.environment["tools"]["ncu"]
    if tool is None:
        raise NotRunError("ncu was not found")
    report = place.out / "ncu.csv"
    # The clocks are left as they are: another job may share the card's host.
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--launch-count", "60", "--log-file", report]
    command += [word for section in SECTIONS for word in ("--section", section)]
    done = place.run(*command, sys.executable, "-m", "gpu.profile_target", seconds=seconds)
    text = report.read_text(errors="replace") if report.exists() else ""
    kernels = profiling.kernels_of(text)
    if done.overran:
        raise OverranError(f"killed after {done.seconds:.0f} s", kernels=kernels)
    if not kernels:
        said = [line for line in [*text.splitlines(), *done.lines] if line.startswith("==ERROR==")]
        raise NotRunError(f"ncu gave no counters: {(said or ['it said nothing'])[0]}")
    return {"kernels": kernels}


def commit_of(root: Path) -> tuple[str, bool | None]:
    """Return the commit, and whether something is not in it; ("unknown", None) without git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown", None
    return commit, bool(git("status", "--porcelain"))


def result_name(gpu: str, date: str, commit: str) -> str:
    """Return ``gpu_<name>_<date>_<commit>.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"gpu_{slug}_{date}_{commit}.json"


def result_of(record: Record) -> dict | None:
    """Return what is kept under benchmarks/results/; None where nothing was measured."""
    stages = record.stages
    gpu = stages.get("environment", {}).get("gpu")
    measured = [row for row in stages.get("bench", {}).get("rows", ()) if "ours" in row]
    if not gpu or not measured:
        return None
    hidden = ("rows", "tail", "kernels")
    return {
        "environment": {**stages["environment"], **record.data["source"]},
        "ceilings": {k: v for k, v in stages.get("ceilings", {}).items() if "_per_s" in k},
        "stages": {
            name: {key: value for key, value in details.items() if key not in hidden}
            for name, details in stages.items()
            if name not in ("environment", "ceilings")
        },
        "kernels": stages.get("ncu", {}).get("kernels", []),
        "rows": measured,
    }


def finish(record: Record, out: Path) -> None:
    """Write the result file, and print the stages and the table."""
    result = result_of(record)
    if result is not None:
        source = record.data["source"]
        name = result_name(result["environment"]["gpu"]["name"], source["date"], source["commit"])
        write_atomically(out / name, json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {out / name}; belongs into benchmarks/results/")
    print()
    for name, details in record.stages.items():
        reason = f": {details['reason']}" if details.get("reason") else ""
        print(f"{name:12} {details['status']:8} {details['seconds']:6.1f} s{reason}")
    bench_stage = record.stages.get("bench", {"status": NOT_RUN})
    if not bench_stage.get("rows"):
        print(f"\nno times: bench {bench_stage['status']}", flush=True)
        return
    gpu = record.stages["environment"]["gpu"]["name"]
    ceilings = record.stages.get("ceilings", {})
    lines = table.text_table(bench_stage["rows"], ceilings, gpu).splitlines()
    write_atomically(out / "table.txt", "\n".join(lines) + "\n")
    more = len(lines) - 1 - PRINTED_ROWS
    if more > 0:
        print(f"\nthe first {PRINTED_ROWS} cases; {more} more are in {out / 'table.txt'}")
    print("\n".join(["", *lines[: PRINTED_ROWS + 1]]), flush=True)
