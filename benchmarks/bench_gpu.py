# SPDX-License-Identifier: Apache-2.0
"""Every operator on a GPU against eager, Triton and compiled rivals.

    python benchmarks/bench_gpu.py --out rows.jsonl --group key --seconds 200
    python benchmarks/bench_gpu.py --rehearse --out rows.jsonl    tiny, on the CPU: no times

Groups: "key", the most important cases first; "compiled", the same against what torch.compile makes
of the rivals; "other" sizes and types. A row is appended as soon as its case is measured. Method:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cases
import torch
from cases import ATTENTION, DENSE, NORM, SMALL, TIED, Case

from uhd_ops import _native

COMPRESSOR, TOWER = MODELS = ("compressor of MiniCPM-V", "tower of MiniCPM-V")
# The sides of 70 x 70 are no multiples of 8 and 16, so larger windows use the nearest grid that
# every rival can divide.
GRIDS = {1024: (32, 32), 4900: (70, 70), 5120: (64, 80), 32768: (128, 256)}
SECONDS_FOR = {"key": 5.0, "compiled": 30.0, "other": 5.0}  # with less left, no case is begun


def cases_of(group: str) -> list[Case]:
    """Return the cases of a group in the order of importance."""

    def both(op: str, tokens: int = 32768, dtype: str = "bfloat16", **options) -> list[Case]:
        return [Case(op, way, dtype, GRIDS[tokens], **options) for way in (False, True)]

    key = [*both(ATTENTION), *both(ATTENTION, 4900), *both(ATTENTION, 1024), *both(NORM)]
    key += [*both(TIED, 4900), *both(DENSE, 4900)]
    large = [*both(ATTENTION, window=8), *both(ATTENTION, window=16)]
    rest = [case for op in SMALL for case in both(op)]
    if group == "key":
        models = [both(op, tokens)[0] for op in MODELS for tokens in (1024, 4900)]
        return key + models + large
    if group == "compiled":
        return key + large + rest
    for dtype in ("bfloat16", "float32", "float16"):
        for tokens in (32768, 4900, 1024):
            for op in (ATTENTION, NORM, TIED, *SMALL[:3]):
                rest += both(op, tokens, dtype)
            for side in (8, 16):
                rest += both(ATTENTION, 5120 if tokens == 4900 else tokens, dtype, window=side)
    return list(dict.fromkeys(case for case in rest if case not in key + large))


def rehearsal(case: Case) -> Case:
    """Return the case in a size that a CPU does at once, through the same code."""
    tiny = {"channels": 32, "heads": 2, "hidden": 24, "grid": (2 * case.window, 4 * case.window)}
    return replace(case, dtype="float32", **tiny)


def timed(call: Callable, device: torch.device) -> dict[str, float | str]:
    """Return medians in microseconds.

    us: between two events, with a cold L2 cache. graph_us: one of many calls in a CUDA graph, with
    a warm cache. host_us: mean time until the call returns to Python; eager_us: of one of as many
    calls in a row, until the last is done.
    """
    start = time.perf_counter()
    if device.type == "cpu":
        call()
        return {"us": (time.perf_counter() - start) * 1e6}
    testing = importlib.import_module("triton.testing")
    found = {"us": 1e3 * testing.do_bench(call, warmup=10, rep=60, return_mode="median")}
    # Enough to even out, but not so many that the queue of the device is full.
    count = max(10, min(100, int(5e4 / found["us"])))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    found["host_us"] = (time.perf_counter() - start) / count * 1e6
    torch.cuda.synchronize()
    found["eager_us"] = (time.perf_counter() - start) / count * 1e6
    try:
        found["graph_us"] = 1e3 * testing.do_bench_cudagraph(call, rep=5, return_mode="median")
    except (RuntimeError, AssertionError) as error:
        found["no_graph"] = str(error).strip()[:200]
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """What the GPU can do at most here and now: a copy of 8 GB, a product of 8192² matrices."""
    if device.type == "cpu":
        return {}
    source = torch.empty(4 * 10**9, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device).unbind()
    copy, product = (timed(f, device)["us"] for f in (lambda: target.copy_(source), lambda: a @ b))
    return {"GB/s": 8e6 / copy, "TFLOP/s": 2 * 8192**3 / product / 1e6}


def problem(case: Case, device: torch.device, group: str):
    """Return tensors, our function, expected results, and functions that make the rivals."""
    if case.op not in MODELS:
        tensors, ours, definition = cases.operator(case, device)
        expected = cases.expected_of(case, definition, tensors)
        if group == "compiled":
            return tensors, ours, expected, cases.compiled(case, device)
        return tensors, ours, expected, cases.eager(case) | cases.handwritten(case, device)
    sizes = {"hidden_size": case.channels, "intermediate_size": case.hidden}
    sizes["num_attention_heads"] = case.heads
    part, dtype = "tower" if case.op == TOWER else "merger", getattr(torch, case.dtype)
    bench_tower = importlib.import_module("bench_tower")
    ours, original = bench_tower.providers(part, 1, dtype, device, case.grid, sizes)
    with torch.no_grad():
        return (), ours, (original().double(),), {"transformers, sdpa": lambda: original}


def measure(case: Case, device: torch.device, group: str, most: dict[str, float]) -> dict:
    """Check and time ours, every rival, and ours again; what a rival raises is recorded."""
    tensors, ours, expected, makers = problem(case, device, group)
    times, failed = {}, {}
    for name, make in {"ours": lambda: ours, **makers, "again": lambda: ours}.items():
        try:
            call = cases.call_of(case, make(), tensors)
            error = cases.check(call(), expected, case.dtype)
            times[name] = {"rel_err": error, **timed(call, device)}
        except Exception as error:  # noqa: BLE001 - a rival may fail in any way
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:400]}"
        call = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises, and so ends the case, when the device is lost
            torch.cuda.empty_cache()
    row = {"dtype": case.dtype, "tokens": case.tokens, "failed": failed}
    if not {"ours", "again"} <= set(times):
        return {**row, "error": f"ours: {failed.get('ours') or failed['again']}"}
    mine, again = times.pop("ours"), times.pop("again")["us"]
    spread, us = abs(mine["us"] - again) / min(mine["us"], again), (mine["us"] + again) / 2
    row |= {"ours": {**mine, "us": us}, "spread": spread}
    row["rivals"] = {name: {**found, "ratio": found["us"] / us} for name, found in times.items()}
    if case.flops:
        row |= {"unit": "TFLOP/s", "rate": case.flops / us / 1e6}
    elif tensors:
        row |= {"unit": "GB/s", "rate": cases.bytes_moved(case, ours, tensors) / us / 1e3}
    if row.get("unit") in most and (not case.flops or case.dtype == "bfloat16"):
        row["of_ceiling"] = row["rate"] / most[row["unit"]]
    return row


def run(several: list[Case], device: torch.device, group: str, out: Path, seconds: float) -> int:
    """Measure cases until the time is over; return 1 if an operator of ours failed."""
    deadline, code, most = time.monotonic() + seconds, 0, ceilings(device)
    for case in several:
        left, name = deadline - time.monotonic(), f"{case.title}, {case.dtype}, {case.tokens}"
        if left < SECONDS_FOR[group]:
            print(f"stopped: {left:.0f} s are left, {name} was next", flush=True)
            break
        try:
            row = measure(case, device, group, most)
        except ImportError as error:  # of a package that only this case needs
            row = {"not_run": str(error)}
        except RuntimeError as error:
            row = {"error": str(error)[:400]}
        with out.open("a") as file:
            row = {"case": name, "group": group, **row, "ceilings": most}
            file.write(json.dumps(row, allow_nan=False) + "\n")
        print(name, row.get("error") or row.get("not_run") or f"{row['ours']['us']:.1f} us")
        for rival, reason in row.get("failed", {}).items():
            print(f"    {rival}: {reason.splitlines()[0]}", flush=True)
        code = code or int("error" in row)
        torch.compiler.reset()  # the next case is compiled for its own shapes
        if device.type == "cuda":
            torch.cuda.synchronize()  # ends the process when the device is lost
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of rows, one JSON per line")
    parser.add_argument("--group", choices=SECONDS_FOR, default="key")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop cleanly after them")
    parser.add_argument("-k", default="", help="only cases whose title contains this")
    parser.add_argument("--rehearse", action="store_true", help="run the code on the CPU, tiny")
    options = parser.parse_args()
    several, device = cases_of(options.group), torch.device("cpu" if options.rehearse else "cuda")
    if options.rehearse:
        several = list(dict.fromkeys(map(rehearsal, several)))
    elif not torch.cuda.is_available() or _native.status["cuda"] != "loaded":
        raise SystemExit(f"there is no CUDA device, or no CUDA library: {_native.status['cuda']}")
    several = [case for case in several if options.k in case.title]
    return run(several, device, options.group, options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
