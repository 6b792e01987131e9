# SPDX-License-Identifier: Apache-2.0
"""Build, test and measure on a GPU in one call; results are on disk after every stage.

    python benchmarks/gpu_all.py --budget 560 --out DIR
    python benchmarks/gpu_all.py --out DIR --stages build,bench

Needs nothing but what is installed: python, torch, nvcc, cmake, ninja, pybind11, pytest. What is
missing (a GPU, a rival, a profiler) is recorded with the reason, and the rest goes on. DIR gets
results.json, log.txt, rows.jsonl, ncu.csv, table.txt, and gpu_<name>_<date>_<commit>.json, the file
that is kept under benchmarks/results/. The last lines are the table. The exit code is 0 unless a
stage failed or overran, or --require-gpu is set and there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import signal
import sys
import time
from pathlib import Path

from gpu import measuring_steps, steps
from gpu.stages import Record, Stage, exit_code, run_stages


def all_stages(place: steps.Workplace) -> list[Stage]:
    """Return the stages in order. ``share`` is where each must be over, as a part of the budget."""

    def stage(run, share, least, needs=(), unless=steps.no_gpu):
        return Stage(run.__name__, functools.partial(run, place), share, least, needs, unless)

    return [
        stage(steps.environment, 0.06, 40, unless=lambda stages: None),
        stage(steps.ceilings, 0.11, 30),
        stage(steps.build, 0.36, 60),
        stage(steps.smoke, 0.41, 30, needs=("build",)),
        stage(steps.tests, 0.55, 40, needs=("build",)),
        # What it runs is the driver; whether that found something makes no difference here.
        stage(steps.sanitizer, 0.62, 20, needs=("build",)),
        stage(measuring_steps.bench, 0.91, 60, needs=("build",)),
        stage(measuring_steps.ncu, 0.99, 20, needs=("build",)),
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", help="only these, separated by commas")
    parser.add_argument("--commit", help="of this checkout, where git is not at hand")
    parser.add_argument("--require-gpu", action="store_true", help="no GPU is a failure")
    options = parser.parse_args(arguments)
    if options.budget <= 0:
        parser.error(f"--budget must be positive, got {options.budget:g}")
    return options


def selected(stages: list[Stage], names: str | None) -> list[Stage]:
    """Return the stages that were asked for, in their own order, and the environment.

    What another stage would have made, a build say, is then taken as it lies there.
    """
    if names is None:
        return stages
    wanted = {"environment", *names.split(",")}
    known = [stage.name for stage in stages]
    unknown = sorted(wanted - set(known))
    if unknown:
        raise SystemExit(f"unknown stages {', '.join(unknown)}; there are {', '.join(known)}")
    return [
        dataclasses.replace(stage, needs=tuple(n for n in stage.needs if n in wanted))
        for stage in stages
        if stage.name in wanted
    ]


def main() -> int:
    options = parse()
    # An end from outside must still end the stage's own process group, so it becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.stdout.reconfigure(line_buffering=True)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    commit, changed = measuring_steps.commit_of(steps.ROOT)
    record = Record(out / "results.json")
    record.data["budget_s"] = options.budget
    record.data["source"] = {
        "commit": options.commit or commit,
        "uncommitted_changes": changed,
        "date": time.strftime("%Y-%m-%d"),
    }
    place = steps.Workplace(out, {})
    place.log.unlink(missing_ok=True)
    run_stages(selected(all_stages(place), options.stages), options.budget, record)
    measuring_steps.finish(record, out)
    reason = steps.no_gpu(record.stages)
    if options.require_gpu and reason:
        print(f"--require-gpu: {reason}", file=sys.stderr, flush=True)
        return 1
    return exit_code(record.stages)


if __name__ == "__main__":
    sys.exit(main())
