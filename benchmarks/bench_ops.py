# SPDX-License-Identifier: Apache-2.0
"""Every operator on the CPU against the strongest ways to write it in PyTorch.

    python benchmarks/bench_ops.py                      all cases; prints ratios, writes results/
    python benchmarks/bench_ops.py -k attention         some cases; writes nothing
    pytest benchmarks/bench_ops.py --benchmark-json F   pytest-benchmark's own report

Each case first checks ours and every rival against the definition in float64, then times them
interleaved.
"""

from __future__ import annotations

import cases
import harness
import pytest
import torch
from cases import ATTENTION, DENSE, NORM, TIED, Case

BOTH_WAYS = (ATTENTION, "pixel_unshuffle", "window_mean", "window_pool")
CASES = [
    Case(op, backward, dtype)
    for op in (*BOTH_WAYS, NORM, TIED, DENSE)
    for backward in ((False, True) if op in BOTH_WAYS else (False,))
    for dtype in ("float32", "bfloat16")
]
ROUNDS = {TIED: 7, DENSE: 5}
CPU = torch.device("cpu")
COLUMNS = {
    "case": lambda row: row["case"],
    "dtype": lambda row: row["dtype"],
    "ours": lambda row: f"{row['ours_ms']:.2f} ms",
    "ours GB/s": lambda row: f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
    "rivals": lambda row: "\n".join(f"{x:6.2f}x {name}" for name, x in row["ratios"].items()),
}

ROWS: list[dict] = []


@pytest.mark.parametrize("case", CASES, ids=[f"{case.title}-{case.dtype}" for case in CASES])
def test_operator(benchmark, case):
    tensors, ours, definition = cases.operator(case, CPU)
    expected = cases.expected_of(case, definition, tensors)
    makers = {"ours": lambda: ours, **cases.eager(case), **cases.compiled(case, CPU)}
    calls = {name: cases.call_of(case, make(), tensors) for name, make in makers.items()}
    for call in calls.values():
        cases.check(call(), expected, case.dtype)
    if not case.flops:
        moved = cases.bytes_moved(case, ours, tensors)
        calls["copy of the same bytes"] = harness.copy_of(moved)
    result = harness.interleave(benchmark, calls.pop("ours"), calls, ROUNDS.get(case.op, 31))
    row = {"case": case.title, "dtype": case.dtype, **result}
    if case.flops:
        row["gflop_per_s"] = case.flops / result["ours_ms"] / 1e6
    else:
        row["gb_per_s"] = moved / result["ours_ms"] / 1e6
        row["copy_gb_per_s"] = moved / result["rivals_ms"]["copy of the same bytes"] / 1e6
    ROWS.append(row)


if __name__ == "__main__":
    raise SystemExit(harness.main(__file__, "cpu", COLUMNS))
