# SPDX-License-Identifier: Apache-2.0
"""The one call that measures a GPU: its stages, its deadlines, and that it ends without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_all  # noqa: E402
from gpu import processes, steps  # noqa: E402
from gpu.stages import (  # noqa: E402
    FailedError,
    NotRunError,
    OverranError,
    Record,
    Stage,
    exit_code,
    run_stages,
    seconds_for,
    write_atomically,
)

# ---- stages


def stage(name, run, *, share=1.0, least=0.0, needs=(), **options):
    return Stage(name, run, share, least, needs, **options)


def raising(error):
    def run(seconds):
        raise error

    return run


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("elapsed", "share", "least", "expected"),
    [
        (0, 0.1, 5, 10),  # up to its share of the budget
        (2, 0.1, 5, 8),  # which begins at the start of the call
        (50, 0.6, 5, 10),
        (58, 0.6, 5, 5),  # later stages still get what they need at least
        (97, 0.6, 5, 3),  # but never more than there is
    ],
)
def test_deadlines(elapsed, share, least, expected):
    made = stage("any", lambda seconds: {}, share=share, least=least)
    assert seconds_for(made, 100.0, elapsed) == pytest.approx(expected)


def test_a_failure_stops_only_what_needs_it(record):
    on_disk = {}

    def last(seconds):
        on_disk.update(json.loads(record.path.read_text())["stages"])
        return {"found": 7}

    run_stages(
        [
            stage("crashes", raising(ZeroDivisionError("by zero"))),
            stage("fails", raising(FailedError("wrong", tail="the end"))),
            stage("hangs", raising(OverranError("killed"))),
            stage("absent", raising(NotRunError("no tool"))),
            stage("needs_crash", lambda seconds: {}, needs=("crashes",)),
            stage("needs_that", lambda seconds: {}, needs=("needs_crash",)),
            stage("last", last),
        ],
        100.0,
        record,
    )
    found = json.loads(record.path.read_text())["stages"]
    assert {name: details["status"] for name, details in found.items()} == {
        "crashes": "failed",
        "fails": "failed",
        "hangs": "overran",
        "absent": "not run",
        "needs_crash": "not run",
        "needs_that": "not run",
        "last": "passed",
    }
    assert found["crashes"]["reason"] == "crashed with ZeroDivisionError: by zero"
    assert found["fails"]["tail"] == "the end"
    assert found["needs_crash"]["reason"].startswith("needs crashes, which is failed: crashed")
    assert found["last"]["found"] == 7
    # Everything before the last stage was in the file while it ran.
    assert list(on_disk) == list(found)[:-1]


def test_a_stage_without_time_does_not_start(record):
    now = iter([0.0, 0.0, 90.0, 90.0, 90.0])
    stages = [
        stage("long", lambda seconds: {}),
        stage("late", raising(AssertionError("it started")), least=20),
    ]
    run_stages(stages, 100.0, record, clock=lambda: next(now))
    assert record.stages["late"]["status"] == "not run"
    assert record.stages["late"]["reason"] == (
        "10 s of the budget are left, it needs at least 20 s"
    )


def test_exit_code():
    assert exit_code({"a": {"status": "passed"}, "b": {"status": "not run"}}) == 0
    assert exit_code({"a": {"status": "passed"}, "b": {"status": "overran"}}) == 1
    assert exit_code({"a": {"status": "failed"}}) == 1


def test_a_file_is_never_half_written(tmp_path, monkeypatch, record):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def refuse(self, target):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    record.data["rate"] = float("nan")  # is no JSON
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write()
    assert not record.path.exists()


# ---- processes


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def run_python(code, tmp_path, seconds):
    command = (sys.executable, "-c", code)
    return processes.run(command, seconds=seconds, log=tmp_path / "log", quiet=True)


CHILD_THAT_STAYS = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
print(child.pid, flush=True)
"""


def test_an_overrun_ends_the_whole_group(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    start = time.monotonic()
    done = run_python(CHILD_THAT_STAYS + "time.sleep(60)", tmp_path, seconds=5)
    assert done.overran
    assert done.returncode is None
    assert time.monotonic() - start < 30  # it was not waited for
    assert not is_alive(int(done.lines[0]))
    assert (tmp_path / "log").read_text().splitlines() == done.lines


def test_a_child_left_behind_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    done = run_python(CHILD_THAT_STAYS, tmp_path, seconds=30)
    assert done.returncode == 0
    assert not is_alive(int(done.lines[0]))


def test_exit_code_and_odd_bytes(tmp_path):
    code = r"import sys; sys.stdout.buffer.write(b'\xff\n'); print('end'); sys.exit(5)"
    done = run_python(code, tmp_path, seconds=30)
    assert (done.returncode, done.lines) == (5, ["\ufffd", "end"])


def test_a_failed_program_shows_its_last_lines(tmp_path, capsys):
    place = steps.Workplace(tmp_path, {})
    code = "print(*range(100), sep='\\n'); raise SystemExit(2)"
    with pytest.raises(FailedError, match="it ended with exit code 2") as caught:
        place.run_checked("it", sys.executable, "-c", code, seconds=30, quiet=True)
    assert caught.value.details["tail"].splitlines() == [str(i) for i in range(60, 100)]
    assert capsys.readouterr().out.splitlines()[-1] == "99"


# ---- the whole call


def call(out, *options):
    # Also where there is a GPU, this is about what happens without.
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_all.py", "--out", out, *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_ends_and_says_why(tmp_path):
    done = call(tmp_path, "--budget", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    stages = record["stages"]
    assert list(stages) == [s.name for s in gpu_all.all_stages(steps.Workplace(tmp_path, {}))]
    environment = stages.pop("environment")
    assert environment["status"] == "passed"
    assert environment["versions"]["python"].count(".") == 2
    for name, details in stages.items():
        assert details["status"] == "not run"
        assert details["reason"] == environment["why_no_gpu"]
        assert f"{name:12} not run" in done.stdout
    assert done.stdout.splitlines()[-1] == "no times: bench not run"
    assert not list(tmp_path.glob("gpu_*.json"))  # nothing was measured, so there is no result


def test_a_required_gpu_that_is_missing_is_a_failure(tmp_path):
    done = call(tmp_path, "--stages", "environment", "--require-gpu")
    assert done.returncode == 1
    assert "--require-gpu: " in done.stderr


def test_stages_are_in_order():
    stages = gpu_all.all_stages(steps.Workplace(Path(), {}))
    shares = [s.share for s in stages]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    names = [s.name for s in stages]
    for position, s in enumerate(stages):
        assert set(s.needs) <= set(names[:position])
    assert sum(s.least for s in stages) < 560


def test_some_stages_only():
    stages = gpu_all.all_stages(steps.Workplace(Path(), {}))
    chosen = gpu_all.selected(stages, "ncu,bench")
    assert [(s.name, s.needs) for s in chosen] == [("environment", ()), ("bench", ()), ("ncu", ())]
    with pytest.raises(SystemExit, match="unknown stages bench_all; there are environment, "):
        gpu_all.selected(stages, "bench_all")
