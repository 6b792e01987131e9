# SPDX-License-Identifier: Apache-2.0
"""The benchmarks without a GPU: their cases, the maths of every rival, and what a row records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
import cases  # noqa: E402
from cases import ATTENTION, DENSE, NORM, SMALL, TIED, TILES, Case  # noqa: E402

CPU = torch.device("cpu")
OPS = (ATTENTION, NORM, TIED, DENSE, *SMALL)
TINY = {"dtype": "float64", "channels": 24, "heads": 2, "hidden": 20}
BOTH_WAYS = pytest.mark.parametrize("backward", [False, True])

# ---- cases


def test_the_most_important_cases_come_first():
    groups = {group: bench_gpu.cases_of(group) for group in bench_gpu.SECONDS_FOR}
    assert [case.title for case in groups["key"][:2]] == [
        "window_attention 2x2 forward",
        "window_attention 2x2 forward + backward",
    ]
    assert {(case.dtype, case.tokens) for case in groups["key"][:2]} == {("bfloat16", 32768)}
    for several in groups.values():
        assert len(set(several)) == len(several)
        assert all(side % case.window == 0 for case in several for side in case.grid)
    assert not set(groups["other"]) & set(groups["key"])
    everything = {*groups["key"], *groups["other"], *groups["compiled"]}
    assert {case.op for case in everything} == {*OPS, *bench_gpu.MODELS}
    for dtype in ("bfloat16", "float16", "float32"):
        for backward in (False, True):
            for window in (2, 8, 16):
                for tokens in (1024, 4900 if window == 2 else 5120, 32768):
                    grid = bench_gpu.GRIDS[tokens]
                    assert Case(ATTENTION, backward, dtype, grid, window) in everything


@pytest.mark.parametrize(
    ("op", "times"),
    [(ATTENTION, 4), ("pixel_unshuffle", 2), ("window_mean", 1.25), ("window_pool", 2.25)],
)
def test_work_is_each_input_and_each_result_once(op, times):
    case = Case(op, grid=(4, 6), **TINY)
    tensors, ours, _ = cases.operator(case, CPU)
    assert cases.bytes_moved(case, ours, tensors) == times * 24 * 24 * 8


# ---- results


@pytest.mark.parametrize("op", OPS)
@BOTH_WAYS
def test_ours_is_called_right(op, backward):
    case = Case(op, backward, grid=(4, 6), **TINY)
    tensors, ours, definition = cases.operator(case, CPU)
    expected = cases.expected_of(case, definition, tensors)
    assert cases.check(cases.call_of(case, ours, tensors)(), expected, "float64") < 1e-12


def epilogue_by_hand(bias, z, weight, use_gelu):
    return F.gelu(F.linear(z, weight.t(), bias), approximate="tanh")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("op", OPS)
@BOTH_WAYS
def test_rivals_compute_the_definition(op, backward, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "_addmm_activation", epilogue_by_hand)  # on a CPU it is another GELU
    for window, grid in ((2, (4, 6)), (8, (8, 16)), (16, (16, 32))):
        case = Case(op, backward, grid=grid, window=window, **TINY)
        tensors, _, definition = cases.operator(case, CPU)
        expected = cases.expected_of(case, definition, tensors)
        makers = cases.eager(case) | {f"{k}!": f for k, f in cases.compiled(case, CPU).items()}
        makers |= cases.handwritten(case, CPU)
        for name in ("varlen attention (FA2)", "Triton, hand-written"):  # need a GPU
            makers.pop(name, None)
        if op == ATTENTION and not backward:  # torch has its backward pass on GPUs only
            makers["flex_attention"] = lambda case=case: cases.flex(case, CPU)
        assert len(makers) >= 2
        for name, make in makers.items():
            error = cases.check(cases.call_of(case, make(), tensors)(), expected, "float64")
            assert error < 1e-12, name
        if op != ATTENTION:
            break


def test_segments_of_variable_length(monkeypatch):
    """The kernel is replaced by attention in each segment that it was told of."""

    def by_segment(q, k, v, starts, _, longest, __):
        parts = []
        for begin in starts[:-1]:
            end = begin + longest
            assert end in starts
            heads = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*heads).transpose(0, 1))
        return torch.cat(parts)

    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", by_segment)
    case = Case(ATTENTION, grid=(8, 12), window=4, **TINY)
    tensors, _, definition = cases.operator(case, CPU)
    expected = cases.expected_of(case, definition, tensors)
    cases.check((cases.varlen(case, CPU)(*tensors),), expected, "float64")


TRITON = """
import sys
sys.path.insert(0, "benchmarks")
import cases, torch, triton_attention
from cases import ATTENTION, Case
cpu = torch.device("cpu")
for grid, heads, dim in (((2, 14), 2, 72), ((6, 4), 1, 64)):
    for backward in (False, True):
        case = Case(ATTENTION, backward, "float32", grid, channels=heads * dim, heads=heads)
        tensors, _, definition = cases.operator(case, cpu)
        expected = cases.expected_of(case, definition, tensors)
        call = cases.call_of(case, cases.triton(case, cpu), tensors)
        print(cases.check(call(), expected, "float32"))
try:
    triton_attention.window_attention(tensors[0].transpose(0, 1), grid)
except ValueError as error:
    print(error)
"""


def test_triton_rival_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *errors, refused = done.stdout.splitlines()
    assert len(errors) == 4
    # Sums of 72 products in float32: at most 72 roundings of half an epsilon.
    assert all(float(error) < 72 * torch.finfo(torch.float32).eps / 2 for error in errors)
    assert refused.startswith("qkv must be contiguous")


# ---- rows


def measure(monkeypatch, ours=None, **makers):
    case = Case("window_mean", grid=(4, 6), **TINY)
    tensors, right, definition = cases.operator(case, CPU)
    problem = tensors, ours or right, cases.expected_of(case, definition, tensors), makers
    monkeypatch.setattr(bench_gpu, "problem", lambda *_: problem)
    row = bench_gpu.measure(case, CPU, "key", {"GB/s": 1e6})
    return json.loads(json.dumps(row, allow_nan=False))


def test_what_fails_is_recorded_with_its_reason(monkeypatch):
    def raising():
        raise NotImplementedError("not on this GPU")

    def mean(x):
        return x.view(2, 2, 3, 2, 24).mean((1, 3)).flatten(0, 1)

    row = measure(
        monkeypatch,
        right=lambda: mean,
        wrong=lambda: lambda x: 2 * mean(x),
        undefined=lambda: lambda x: mean(x) * float("nan"),
        raising=raising,
    )
    assert set(row["rivals"]) == {"right"}
    assert row["failed"] == {
        "wrong": "ValueError: wrong: relative errors [1.0], at most 1e-09 is sane",
        "undefined": "ValueError: wrong: relative errors [nan], at most 1e-09 is sane",
        "raising": "NotImplementedError: not on this GPU",
    }
    assert row["rivals"]["right"]["ratio"] == row["rivals"]["right"]["us"] / row["ours"]["us"]
    moved = (24 + 6) * 24 * 8
    assert row["rate"] == pytest.approx(moved / row["ours"]["us"] / 1e3)
    assert row["of_ceiling"] == pytest.approx(row["rate"] / 1e6)


def test_ours_must_be_right(monkeypatch):
    row = measure(monkeypatch, ours=lambda x: x.new_zeros(6, 24))
    assert row["error"].startswith("ours: ValueError: wrong: relative errors [1.0]")
    assert "ours" not in row


@pytest.mark.parametrize(
    ("outcome", "seconds", "code", "key"),
    [
        (RuntimeError("out of memory"), 60.0, 1, "error"),
        (ImportError("no transformers"), 60.0, 0, "not_run"),  # is no failure
        (AssertionError("it began"), 1.0, 0, None),
    ],
)
def test_cases_that_are_not_measured(monkeypatch, tmp_path, capsys, outcome, seconds, code, key):
    def measure(*_):
        raise outcome

    monkeypatch.setattr(bench_gpu, "measure", measure)
    out = tmp_path / "rows.jsonl"
    assert bench_gpu.run([Case(TILES), Case(NORM)], CPU, "key", out, seconds) == code
    printed = capsys.readouterr().out
    if key is None:
        assert printed.startswith("stopped: 1 s are left, tile_weight forward, ")
        assert not out.exists()
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row[key] for row in rows] == [str(outcome)] * 2


def test_rehearsal_runs_the_program(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    command = ["bench_gpu.py", "--rehearse", "--out", str(out), "-k", "MiniCPM"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_gpu.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == [
        f"{op} forward, float32, 32" for op in bench_gpu.MODELS
    ]
    assert all(set(row["rivals"]) == {"transformers, sdpa"} for row in rows)
