# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what stands in front of the kernels: its calls, its ratios, what it records."""

import json
import sys
from pathlib import Path

import pytest
import torch

import uhd_ops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_host


def test_rows_and_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests, too
    path = tmp_path / "host.json"
    assert bench_host.main(["--json", str(path), "--rounds", "1"]) == 0
    recorded = json.loads(path.read_text())
    assert {"cpu", "torch", "commit"} <= recorded["environment"].keys()
    times = {(row["group"], row["call"]): row["us"] for row in recorded["rows"]}
    names = list(bench_host.calls())
    assert list(times) == [(group, name) for group in bench_host.GROUPS for name in names]
    for row in recorded["rows"]:
        rival = bench_host.BLOCK if row["call"] == "EarlyCompressor" else bench_host.SDPA
        assert row["rival"] == rival
        assert row["ratio"] == pytest.approx(row["us"] / times[row["group"], rival])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in printed[1:]] == names


@pytest.mark.parametrize("gradients", [False, True])
def test_calls_are_of_one_size(gradients):
    calls = bench_host.calls(gradients=gradients)
    results = {name: call() for name, call in calls.items()}
    tokens = {name: result.numel() for name, result in results.items()}
    attention = ("window_attention", "window_attention_qkvpacked", bench_host.BLOCK)
    for name in attention:
        assert tokens[name] == tokens[bench_host.SDPA]
    assert all(result.requires_grad == gradients for result in results.values())
    assert {name for name in calls if hasattr(uhd_ops, name)} >= {"window_pool", "window_mean"}
    if gradients:
        for name, call in calls.items():
            grads = bench_host.backward_of(call)()
            assert grads, name
            assert all(torch.isfinite(grad).all() for grad in grads)
