# SPDX-License-Identifier: Apache-2.0
"""The benchmark of scale: it runs, and what it fits and counts is right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_scale


def test_quick(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests, too
    monkeypatch.setattr(bench_scale.harness, "store", pytest.fail)
    assert bench_scale.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in {*bench_scale.OPERATORS, *bench_scale.BEYOND}:
        # By tokens and by views, and beyond so many elements; both passes.
        wanted = 4 * (name in bench_scale.OPERATORS) + 2 * (name in bench_scale.BEYOND)
        assert sum(line.startswith(f"{name} forward") for line in lines) == wanted


def test_exponents():
    assert bench_scale.exponent([10, 100, 1000], [2, 20, 200]) == pytest.approx(1)
    assert bench_scale.exponent([10, 100, 1000], [5, 500, 50_000]) == pytest.approx(2)


def test_memory_is_what_a_call_needs_on_the_way():
    def call():
        torch.ones(8 * 2**20)  # 32 MiB, given back
        return torch.ones(2 * 2**20)

    assert bench_scale.growth_of(call) == pytest.approx(32 * 2**20, rel=0.1)


def test_a_wrong_result_beyond_32_bits_is_an_error(monkeypatch):
    count, columns, mean = bench_scale.BEYOND["window_mean"]

    def wraps(x, grids):
        out = mean(x, grids)
        return out.roll(1, 0) if x.numel() > 2**22 else out

    monkeypatch.setattr(bench_scale, "BEYOND", {"window_mean": (count, columns, wraps)})
    with pytest.raises(AssertionError, match="window_mean, forward: the last view is wrong"):
        bench_scale.beyond_32_bits(bench_scale.Sizes(elements=2**24))
