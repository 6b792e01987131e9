# SPDX-License-Identifier: Apache-2.0
"""The one call that measures a GPU: its steps, its deadlines, and that it ends without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_all  # noqa: E402
import report  # noqa: E402

PYTHON = sys.executable


def python(code):
    return [PYTHON, "-c", code]


@pytest.fixture
def run_steps(tmp_path, monkeypatch):
    """Return a function that runs made-up steps and returns what is known of each."""

    def run(planned, budget=100.0, why_not=""):
        results = {"steps": {}, "rows": []}
        gpu_all.run_steps(planned, results, why_not, tmp_path, budget)
        assert json.loads((tmp_path / "results.json").read_text()) == results
        return results

    monkeypatch.setattr(gpu_all, "LEAST_S", 0.5)
    return run


# ---- steps


def test_a_failure_stops_nothing_but_what_needs_the_build(run_steps, tmp_path):
    rows, results = str(tmp_path / "rows.jsonl"), str(tmp_path / "results.json")
    write = f"""open({rows!r}, "w").write('{{"case": "a"}}\\n{{"case": "b", "ou')"""
    planned = {
        "build": (0.1, [python("print('made')"), python("print('installed')")]),
        "tests": (0.3, [python("print('first'); raise SystemExit(3)"), python("print('second')")]),
        "memcheck": (0.4, [["a tool that is not there"]]),
        "key cases": (0.6, [python(write)]),
        "last": (0.8, [python(f"import json; print(list(json.load(open({results!r}))['steps']))")]),
    }
    results = run_steps(planned)
    steps = results["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {
        "build": "passed",
        "tests": "failed",
        "memcheck": "not run",
        "key cases": "passed",
        "last": "passed",
    }
    assert steps["build"]["said"] == "installed"
    assert (steps["tests"]["said"], steps["tests"]["tail"]) == ("first (exit code 3)", "first")
    assert steps["memcheck"]["said"] == "there is no a tool that is not there"
    assert results["rows"] == [{"case": "a"}]  # the other was cut off
    # Everything before the last step was in the file while it ran.
    assert steps["last"]["said"] == str(list(steps)[:-1])
    planned["build"] = (0.1, [python("raise SystemExit('no compiler')")])
    steps = run_steps(planned)["steps"]
    assert steps["build"]["status"] == "failed"
    assert {steps[name]["said"] for name in list(planned)[1:]} == {
        "build failed: no compiler (exit code 1)"
    }


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_an_overrun_ends_the_whole_group_and_leaves_time_for_the_next(run_steps):
    child = f"subprocess.Popen([{PYTHON!r}, '-c', 'import time; time.sleep(60)'])"
    code = f"import subprocess, time; print({child}.pid, flush=True)"
    start = time.monotonic()
    steps = run_steps(
        {
            "leaves a child": (0.4, [python(code)]),
            "hangs": (0.7, [python(f"{code}; time.sleep(60)")]),
            "next": (0.95, [python("print('ran')")]),
        },
        budget=12.0,
    )["steps"]
    assert time.monotonic() - start < 20
    assert [step["status"] for step in steps.values()] == ["passed", "overran", "passed"]
    for name in ("leaves a child", "hangs"):
        assert not is_alive(int(steps[name]["said"].split()[0]))
    assert steps["next"]["said"] == "ran"


def test_a_step_without_time_does_not_start(run_steps):
    steps = run_steps({"a": (0.001, [python("print(1)")]), "b": (1.0, [python("print(2)")])})
    assert steps["steps"]["a"]["status"] == "not run"
    assert steps["steps"]["a"]["said"] == "0 s are left"
    assert steps["steps"]["b"]["said"] == "2"


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("========= ERROR SUMMARY: 3 errors", 9, "failed"),
        ("= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 1, "failed"),  # of the driver itself
        ("========= Error: Device not supported\n= ERROR SUMMARY: 1 error", 9, "not run"),
        ("Segmentation fault", -11, "failed"),
        ("all 100 checks passed", 0, "failed"),  # the tool said nothing
    ],
)
def test_verdicts_on_the_sanitizer(monkeypatch, tmp_path, said, code, expected):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_all, "PATH", str(tmp_path))
    monkeypatch.setattr(gpu_all, "run", lambda *_: (code, said))
    commands = gpu_all.steps(tmp_path, 90)["memcheck"][1]
    assert gpu_all.attempt(commands, 0.0, tmp_path / "log")["status"] == expected


def files_of(step):
    (command,) = step[1]
    return {Path(word) for word in command if str(word).endswith(".py")}


@pytest.mark.parametrize(("capability", "arch"), [(80, "80-real"), (90, "90a-real"), (120, "120a")])
def test_what_is_planned(tmp_path, capability, arch):
    planned = gpu_all.steps(tmp_path, capability)
    shares = [share for share, _ in planned.values()]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    assert list(planned)[:5] == ["build", "driver", "smoke", "equality", "key cases"]
    assert any(f"-DUHD_CUDA_ARCHS={arch}" in word for word in map(str, planned["build"][1][1]))
    files = files_of(planned["equality"])
    assert {"test_battery_values.py", "test_battery_gradients.py"} <= {path.name for path in files}
    assert not files & files_of(planned["other tests"])
    files |= files_of(planned["other tests"])
    assert len(files) > 5
    # A test with the mark in another file would not be run.
    folder = ROOT / "python_tests"
    marked = {p for p in folder.glob("test_*.py") if re.search(r"mark\.cuda\b", p.read_text())}
    assert marked - {Path(__file__)} <= files


def test_a_rehearsal_has_the_same_steps_without_a_gpu(tmp_path):
    planned, rehearsed = (gpu_all.steps(tmp_path, 90, rehearse) for rehearse in (False, True))
    left_out = {"driver", "memcheck", "racecheck", "initcheck", "synccheck"}
    assert list(rehearsed) == [name for name in planned if name not in left_out]
    for name in ("equality", "other tests"):
        (command,) = rehearsed[name][1]
        assert "--collect-only" in command
        assert files_of(rehearsed[name]) == files_of(planned[name])
    words = [
        [str(word) for word in command] for _, several in rehearsed.values() for command in several
    ]
    assert not any("--build" in command or "cuda" in command for command in words)
    assert not any(str(gpu_all.BUILD) in command for command in words)
    benchmarks = [command for command in words if "benchmarks/bench_gpu.py" in command]
    assert len(benchmarks) == 3
    assert all("--rehearse" in command for command in benchmarks)


def rehearse(monkeypatch, tmp_path, capsys, *commands):
    planned = {"build": (0.5, [python("")]), "key cases": (0.9, list(commands))}
    monkeypatch.setattr(gpu_all, "steps", lambda *_: planned)
    monkeypatch.setattr(gpu_all, "DESCRIBE", "print('{}')")
    monkeypatch.setattr(gpu_all.signal, "signal", lambda *_: None)  # of this process
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--rehearse", "--out", str(tmp_path)])
    return gpu_all.main(), capsys.readouterr().out.splitlines()[-1]


def test_a_rehearsal_fails_where_anything_is_left_out(monkeypatch, tmp_path, capsys):
    write = """import pathlib; pathlib.Path({!r}).write_text('{{"case": "a tower"{}}}')"""
    rows, not_run = str(tmp_path / "rows.jsonl"), ', "not_run": "no module"'
    answers = [
        rehearse(monkeypatch, tmp_path, capsys, *commands)
        for commands in (
            [python(write.format(rows, ""))],
            [python(write.format(rows, not_run))],
            [["a tool that is not there"]],
            [python("raise SystemExit(1)")],
        )
    ]
    assert answers == [
        (0, "not rehearsed: nothing"),
        (1, "not rehearsed: a tower"),
        (1, "not rehearsed: key cases"),
        (1, "not rehearsed: key cases"),
    ]
    assert not list(tmp_path.glob("gpu_*.json"))


# ---- the whole call


def test_without_a_gpu_it_ends_and_says_why(tmp_path):
    done = subprocess.run(
        [PYTHON, ROOT / "benchmarks" / "gpu_all.py", "--out", tmp_path, "--commit", "abc"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},  # also where there is one
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["commit"] == "abc"
    assert results["environment"]["torch"].count(".") >= 2
    assert list(results["steps"]) == list(gpu_all.steps(tmp_path, 0))
    for name, step in results["steps"].items():
        assert (step["status"], step["said"]) == ("not run", "torch finds no CUDA device")
        assert f"\n{name:16} not run " in done.stdout
    assert not list(tmp_path.glob("gpu_*.json"))  # nothing was measured, so there is no result


# ---- what it means


def row(case, us, others, **facts):
    times = {name: {"us": t, "ratio": t / us} for name, t in others.items()}
    ours = {"us": us, "graph_us": us - 1, "eager_us": us + 1, "host_us": 20.0}
    row = {"case": case, "group": "key", "ours": ours, "spread": 0.02, "rivals": times}
    return {**row, "rate": 2745.4, "unit": "GB/s", "of_ceiling": 0.92, **facts}


def test_lines_of_the_table():
    slow = row("b, 1024", 100.0, {"a": 99.0}, group="compiled")
    rows = [row("a, 32768", 110.0, {"a": 220.0}), row("b, 1024", 50.0, {"c": 45.0}), slow]
    rows += [row("d", 1.0, {}), {"case": "x", "error": "ours: wrong"}]
    head, *lines, last = gpu_all.table(rows).splitlines()
    assert head.startswith("case      us     graph")
    assert lines[0].split("  ")[0] == "a, 32768"
    assert lines[0].endswith(
        "110.0  109.0  111.0  20.0  2745 GB/s  92%         2.00x (a)        faster"
    )
    assert lines[1].endswith("0.90x (c)        LOSES")
    assert lines[2].endswith("no rival")
    assert last == "x  ours: wrong"
    assert gpu_all.cells(slow)[-1] == "ties"


def test_readme_of_a_run_and_of_none(tmp_path):
    assert report.gpu_block(None) == "GPU: not measured yet.\n"
    assert report.newest("gpu", ROOT / "docs") is None
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert report.with_block(text, "x", "new\n") == text.replace("old", "new")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    most = {"GB/s": 3000.0, "TFLOP/s": 800.0}
    found = [row("a", 110.0, {"a": 220.0}, ceilings=most), row("b", 9.0, {}, group="other")]
    facts = {"gpu": "NVIDIA H100", "torch": "2.11.0", "commit": "abc1234", "date": "2026-11-21"}
    gpu_all.write(folder / "gpu_x.json", {"environment": facts, "rows": found})
    block = report.gpu_block(report.newest("gpu", tmp_path), tmp_path)
    assert block.splitlines()[2:4] == ["| a | 110.0 µs | 2745 GB/s | 92% | 2.00x (a) |", ""]
    assert "3000 GB/s and 800 TFLOP/s" in block
