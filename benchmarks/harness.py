# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing on a noisy machine, and a record of what was measured where.

One round runs every provider once. A slow spell of the machine then hits all of them, and the ratio
of the medians stays meaningful where single times do not. pytest-benchmark times our operator; its
rivals run, and are timed, in the set-up of each round.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import torch

import uhd_ops

RESULTS = Path(__file__).resolve().parent / "results"
Provider = Callable[[], object]


def environment() -> dict[str, object]:
    """Machine, versions and commit that the numbers of this process belong to."""

    def command(*words: str) -> str:
        if shutil.which(words[0]) is None:  # git is not on every machine with a GPU
            return ""
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    root = Path(__file__).resolve().parent.parent
    # What one benchmark has written changes nothing that the next one measures.
    changed = ("git", "-C", str(root), "status", "--porcelain", "--", ":!benchmarks/results")
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": uhd_ops._native.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "uhd_ops": uhd_ops.__version__,
        "commit": command("git", "-C", str(root), "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(command(*changed)),
        "date": time.strftime("%Y-%m-%d"),
    }


def interleave(benchmark, ours: Provider, rivals: Mapping[str, Provider], rounds: int) -> dict:
    """Time ``ours`` with pytest-benchmark and every rival once per round.

    Args:
        benchmark: The pytest-benchmark fixture.
        ours: What is measured.
        rivals: What it is compared with; each is warmed up (compiled) before the first round.
        rounds: Number of rounds.

    Returns:
        ``{"ours_ms": median, "rivals_ms": {name: median}, "ratios": {name: median of the rounds'
        ratios}}``. It is also stored in pytest-benchmark's ``extra_info``.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}

    def run_rivals() -> None:
        for name, rival in rivals.items():
            start = time.perf_counter()
            rival()
            times[name].append(time.perf_counter() - start)

    for provider in (ours, *rivals.values()) * 2:
        provider()
    benchmark.pedantic(ours, setup=run_rivals, rounds=rounds, iterations=1)
    mine = benchmark.stats.stats.data
    result = {
        "ours_ms": statistics.median(mine) * 1e3,
        "rivals_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "ratios": {
            name: statistics.median(theirs / ours_ for theirs, ours_ in zip(t, mine, strict=True))
            for name, t in times.items()
        },
    }
    benchmark.extra_info.update(result)
    return result


def copy_of(num_bytes: int) -> Provider:
    """Return a copy that moves ``num_bytes``, half of them read, into memory that is mapped."""
    source = torch.ones(num_bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def main(
    file: str, kind: str, columns: Mapping[str, Callable[[dict], str]], keep: bool = True
) -> int:
    """Run a file of benchmarks, print its rows, and store them under ``results/``.

    Args:
        file: Its path. Its ``ROWS`` gets a row for every case.
        kind: What the name of the result begins with.
        columns: The table's columns, each a function of a row.
        keep: Store the rows, if all of them were asked for.
    """
    from rich.console import Console  # here, because the benchmark on a GPU does without
    from rich.table import Table

    options = sys.argv[1:]
    # Packages with plugins for pytest may be imported already, too early to be rewritten.
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
    code = pytest.main(
        [file, "-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", *quiet, *options]
    )
    rows = importlib.import_module(Path(file).stem).ROWS  # pytest imported it under this name
    table = Table(*columns, title="median of the rounds' ratios; above 1: ours is faster")
    for row in rows:
        table.add_row(*(column(row) for column in columns.values()), end_section=True)
    Console(width=120).print(table)
    if code == 0 and not options and keep:
        store(kind, rows)
    return int(code)


def store(kind: str, rows: list[dict]) -> None:
    """Write rows under ``results/``, with what they belong to."""
    facts = environment()
    path = RESULTS / f"{kind}_{facts['cpu_isa']}_{facts['date']}_{facts['commit']}.json"
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    print(f"written: benchmarks/results/{path.name}")
