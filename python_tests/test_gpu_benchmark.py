# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: how it measures and what it records, its table, the README."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
import report  # noqa: E402
from gpu import (  # noqa: E402
    measure,
    measuring_steps,
    mlp_rivals,
    problems,
    rows,
    table,
    timing,
)
from gpu.cases import ATTENTION, FORWARD, MEAN, TIED, TILES, Case  # noqa: E402
from gpu.stages import Record  # noqa: E402

CPU = torch.device("cpu")
TINY = {"dtype": "float64", "channels": 24, "heads": 2, "hidden": 20}
H100 = "NVIDIA H100 80GB HBM3"

# ---- measuring


class LostTimer(timing.HostTimer):
    """A device that is lost as soon as something fails."""

    def synchronize(self):
        raise RuntimeError("device lost")


SMALL = Case(MEAN, FORWARD, grid=(4, 6), **TINY)


def raising(case, device):
    raise NotImplementedError("not on this GPU")


def slow(case, device):
    return lambda x: time.sleep(30)


def with_rivals(monkeypatch, *several):
    monkeypatch.setitem(problems.RIVALS, MEAN, several)


def run_measure(seconds=60.0, skip=None, timer=None):
    return measure.measure(SMALL, CPU, timer or timing.HostTimer(), seconds, skip or {})


def test_what_fails_is_recorded_with_its_reason(monkeypatch):
    monkeypatch.setattr(measure, "COMPILE_LIMIT_S", 3.0)
    with_rivals(
        monkeypatch,
        problems.Rival("right", mlp_rivals.mean),
        problems.Rival(
            "wrong", lambda case, device: lambda x: mlp_rivals.mean(case, device)(x) * 2
        ),
        problems.Rival("raising", raising),
        problems.Rival("slow", slow),
        problems.Rival("skipped", raising),
        problems.Rival("other", lambda case, device: lambda x: x[:3] + 1, same_function=False),
    )
    row = json.loads(json.dumps(run_measure(skip={"skipped": "lost the device"}), allow_nan=False))
    assert set(row["rivals"]) == {"right", "other"}
    assert row["failed"] == {
        "wrong": "ValueError: wrong: relative error 1.0e+00 above 1e-09",
        "raising": "NotImplementedError: not on this GPU",
        "slow": "TimeoutError: compiling and the first call took longer than 3 s",
        "skipped": "lost the device",
    }
    assert row["ours"]["us_p10"] <= row["ours"]["us"] <= row["ours"]["us_p90"]
    assert row["ours"]["rounds"] == 2 * row["rivals"]["right"]["rounds"]  # timed twice
    assert table.best_rival(row)[0] == "right"  # what computes something else is no rival


def test_ours_must_be_right(monkeypatch):
    with_rivals(monkeypatch)
    monkeypatch.setattr(problems, "ours", lambda case, device: lambda x: x.new_zeros(6, 24))
    row = run_measure()
    assert row["error"] == "ours: ValueError: wrong: relative error 1.0e+00 above 1e-09"
    assert "ours" not in row


def test_not_a_number_is_wrong():
    one = torch.ones(2, dtype=torch.float64)
    assert measure.relative_error([one * float("nan")], [one]) == float("inf")
    with pytest.raises(ValueError, match="expected 2 results, got 1"):
        measure.relative_error([one], [one, one])


def test_a_lost_device_is_blamed_once(monkeypatch, tmp_path):
    with_rivals(monkeypatch, problems.Rival("raising", raising))
    # The first synchronisation of ours fails here too, so ours is what lost it.
    out, soon = tmp_path / "rows.jsonl", time.monotonic() + 60
    assert bench_gpu.run([SMALL], CPU, LostTimer(), out, soon) == rows.LOST_DEVICE
    assert rows.read(out)[1][SMALL.name] == {"ours": "lost the device: RuntimeError: device lost"}
    assert bench_gpu.run([SMALL], CPU, timing.HostTimer(), out, soon) == 1
    (row,), _ = rows.read(out)
    assert row["error"] == "ours: lost the device: RuntimeError: device lost"
    # A third process finds the case done.
    assert bench_gpu.run([SMALL], CPU, timing.HostTimer(), out, soon) == 0


def test_it_stops_before_the_deadline(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert bench_gpu.run([SMALL], CPU, timing.HostTimer(), out, time.monotonic() + 1) == 0
    assert "stopped: " in capsys.readouterr().out
    assert not out.exists()


def test_rehearsal_runs_the_program(tmp_path):
    script, out = ROOT / "benchmarks" / "bench_gpu.py", tmp_path / "rows.jsonl"
    command = [sys.executable, script, "--rehearse", "-k", "window_mean", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, _ = rows.read(out)
    assert [row["case"] for row in found] == [
        "window_mean forward, float32, 32",
        "window_mean backward, float32, 32",
    ]
    assert all(set(row["rivals"]) == {"eager", "eager avg_pool2d"} for row in found)
    assert done.stdout.count(" us, spread ") == 2


# ---- tables


def fake_row(case, us, others, **facts):
    return {
        **{key: getattr(case, key) for key in ("op", "direction", "dtype", "tokens", "window")},
        **{key: getattr(case, key) for key in ("bytes_moved", "flops", "compute_bound")},
        "case": case.name,
        "ours": {"us": us, "spread": 0.02},
        "rivals": {n: {"us": t, "same_function": n != "other"} for n, t in others.items()},
        **facts,
    }


CEILINGS = {"copy_gb_per_s": 3000.0, "gemm_tflop_per_s": {"bfloat16": 800.0}}
FIRST = Case(ATTENTION, FORWARD)


def test_lines_of_the_table():
    line = table.line_of(fake_row(FIRST, 110.0, {"a": 220.0, "other": 50.0}), CEILINGS, H100)
    assert line[1:] == (
        *("110.0", "2745 GB/s", "92%", "2.00x (a)", "115 (H100, computed)"),
        "as predicted or better",
    )
    line = table.line_of(fake_row(Case(TIED, FORWARD), 869.0, {"a": 800.0}), {}, H100)
    assert line[2:4] == ("467 TFLOP/s", "")
    assert line[-1] == "LOSES to a, +10% of predicted"
    assert table.verdict(fake_row(FIRST, 110.0, {"a": 109.0}), "A100") == "ties"
    assert table.verdict(fake_row(Case(TILES, FORWARD), 84.0, {}), "A100") == "no rival"
    failed = {"case": "x", "error": "ours: wrong"}
    assert table.line_of(failed, CEILINGS, H100)[-1] == "ours: wrong"
    text = table.text_table([fake_row(FIRST, 110.0, {}), failed], CEILINGS, H100)
    assert len(text.splitlines()) == 3


def test_readme_without_a_run_has_no_number():
    assert report.gpu_block(None) == "GPU: not measured yet.\n"
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert report.with_block(text, "x", "new\n") == text.replace("old", "new")
    assert report.newest("gpu", ROOT / "docs") is None


def test_readme_of_a_run(tmp_path, capsys, monkeypatch):
    record = Record(tmp_path / "results.json")
    record.data["source"] = {
        "commit": "abc1234",
        "uncommitted_changes": False,
        "date": "2026-11-21",
    }
    found = [fake_row(FIRST, 110.0, {"a": 220.0}), {"case": "x", "error": "ours: wrong"}]
    found.append(fake_row(replace(FIRST, dtype="float16"), 111.0, {}))
    gpu = {"name": H100}
    record.stages.update(
        environment={"status": "passed", "seconds": 1, "gpu": gpu, "versions": {"torch": "2.11.0"}},
        ceilings={"status": "passed", "seconds": 1, **CEILINGS},
        bench={"status": "failed", "seconds": 1, "reason": "1 case", "rows": found},
    )
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(measuring_steps, "PRINTED_ROWS", 2)
    measuring_steps.finish(record, folder)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("window_attention 2x2 forward, bfloat16, 32768  110.0  2745 GB/s")
    assert printed[-1].endswith("ours: wrong")
    assert len((folder / "table.txt").read_text().splitlines()) == 4
    path = report.newest("gpu", tmp_path)
    assert path.name == "gpu_nvidia-h100-80gb-hbm3_2026-11-21_abc1234.json"
    block = report.gpu_block(path, tmp_path)
    assert block.splitlines()[2:4] == [
        "| window_attention 2x2 forward | 110.0 µs | 2745 GB/s | 92% | 2.00x (a) |",
        "",
    ]
    assert "copy 3000 GB/s, product 800 TFLOP/s" in block
    assert not re.search("predicted|computed|None", block)
