# SPDX-License-Identifier: Apache-2.0
"""Every operator on a GPU against its rivals, the most important cases first.

    python benchmarks/bench_gpu.py --out rows.jsonl --until $(($(date +%s) + 200))
    python benchmarks/bench_gpu.py --out rows.jsonl -k window_attention
    python benchmarks/bench_gpu.py --list
    python benchmarks/bench_gpu.py --rehearse --out rows.jsonl       tiny, on the CPU: no times

A row is appended to the file as soon as its case is measured; cases that the file has already are
left out, so a run can be continued. Method: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch._functorch.config
from gpu import rows, timing
from gpu.cases import Case, all_cases
from gpu.measure import OURS, DeadDeviceError, measure, release
from gpu.table import best_rival

from uhd_ops import _native

# Left in the budget, a case is begun only with that many seconds.
SECONDS_FOR = {True: 12.0, False: 4.0}


def rehearsal(case: Case) -> Case:
    """Return the case in a size that a CPU does at once, through the same code."""
    side = 2 * case.window
    tiny = {"channels": 32, "heads": 2, "hidden": 24, "grid": (side, 2 * side)}
    return replace(case, dtype="float32", thorough=False, **tiny)


def rehearsals(cases: list[Case]) -> list[Case]:
    return list({tiny.name: tiny for tiny in map(rehearsal, cases)}.values())


def line_of(row: dict) -> str:
    """Return one line for somebody who watches."""
    if "ours" not in row:
        return f"{row['case']}: {row['error']}"
    rival = best_rival(row)
    text = f"{row['case']}: {row['ours']['us']:.1f} us, spread {row['ours']['spread']:.1%}"
    return text + (f", {rival[1]:.2f}x against {rival[0]}" if rival else "")


def attempt(case, device, timer, seconds: float, skip: dict[str, str]) -> dict:
    """Measure a case; what goes wrong outside an implementation (no memory, say) is its row."""
    try:
        return measure(case, device, timer, seconds, skip)
    except DeadDeviceError:
        raise
    except RuntimeError as error:
        message = str(error)[:400]
    try:
        timer.synchronize()
    except RuntimeError as error:
        raise DeadDeviceError(OURS, message) from error
    return {"case": case.name, "error": message, "failed": {}, "rivals": {}}


def run(cases, device, timer, out: Path, deadline: float) -> int:
    """Measure cases until the deadline; return 1 if an operator of ours failed."""
    earlier, lost = rows.read(out)
    done = {row["case"] for row in earlier}
    code = 0
    for case in cases:
        if case.name in done:
            continue
        left = deadline - time.monotonic()
        if left < SECONDS_FOR[case.thorough]:
            print(f"stopped: {left:.0f} s are left, {case.name} was next", flush=True)
            break
        try:
            row = attempt(case, device, timer, left, lost.get(case.name, {}))
        except DeadDeviceError as error:
            facts = {"lost_device": error.implementation, "message": f"lost the device: {error}"}
            rows.append(out, {"case": case.name, **facts})
            print(f"{case.name}: {error.implementation} lost the device: {error}", flush=True)
            return rows.LOST_DEVICE
        rows.append(out, row)
        print(line_of(row), flush=True)
        for name, reason in row["failed"].items():
            if name != OURS:
                print(f"    not timed: {name}: {reason.splitlines()[0]}", flush=True)
        code = code or int("ours" not in row)
        torch.compiler.reset()
        release(device)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the operators on a GPU.")
    parser.add_argument("--out", type=Path, help="file of rows, one JSON object per line")
    parser.add_argument("--until", type=float, help="stop cleanly then, in seconds since the epoch")
    parser.add_argument("-k", default="", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the cases in order and stop")
    parser.add_argument("--rehearse", action="store_true", help="run the code on the CPU, tiny")
    options = parser.parse_args()
    deadline = float("inf")
    if options.until is not None:
        deadline = time.monotonic() + options.until - time.time()
    cases = rehearsals(all_cases()) if options.rehearse else all_cases()
    cases = [case for case in cases if options.k in case.name]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.out is None:
        parser.error("--out is required")
    if options.rehearse:
        device, timer = torch.device("cpu"), timing.HostTimer()
    elif not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --rehearse runs the same code on the CPU")
    elif _native.status["cuda"] != "loaded":
        raise SystemExit(f"uhd_ops has no CUDA kernels: {_native.status['cuda']}")
    else:
        device, timer = torch.device("cuda", 0), timing.CudaTimer()
    # A compiled backward pass is run many times over one graph here.
    torch._functorch.config.donated_buffer = False
    with timer:
        return run(cases, device, timer, options.out, deadline)


if __name__ == "__main__":
    sys.exit(main())
