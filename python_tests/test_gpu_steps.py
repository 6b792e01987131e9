# SPDX-License-Identifier: Apache-2.0
"""What the stages on a GPU make of the output of compilers, sanitizers, profilers and tests."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import measuring_steps, processes, profiling, rows, steps  # noqa: E402
from gpu.stages import OverranError  # noqa: E402

# ---- what the programs of others say


@pytest.mark.parametrize(
    ("lines", "returncode", "expected"),
    [
        (["========= ERROR SUMMARY: 0 errors"], 0, "clean"),
        (["========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], 0, "clean"),
        (["========= ERROR SUMMARY: 3 errors"], 9, "3 errors, exit code 9"),
        (["========= RACECHECK SUMMARY: 2 hazards displayed"], 9, "2 errors, exit code 9"),
        (["========= ERROR SUMMARY: 0 errors"], 1, "0 errors, exit code 1"),
        (
            ["========= Error: Device not supported", "========= ERROR SUMMARY: 1 error"],
            9,
            "refused: ========= Error: Device not supported",
        ),
        (
            ["========= Error: Race reported", "========= ERROR SUMMARY: 1 error"],
            9,
            "1 errors, exit code 9",
        ),
        (["unable to say", "========= ERROR SUMMARY: 2 errors"], 9, "2 errors, exit code 9"),
        (["Segmentation fault"], -11, "no summary, exit code -11"),
        ([], None, "overran: killed after 2 s"),
    ],
)
def test_sanitizer_verdicts(lines, returncode, expected):
    assert steps.sanitizer_verdict(processes.Outcome(returncode, lines, 2.0)) == expected


def test_pytest_counts():
    lines = ["...", "2 failed, 31 passed, 1 skipped, 900 deselected, 1 error in 12.3s", ""]
    expected = {"failed": 2, "passed": 31, "skipped": 1, "deselected": 900, "error": 1}
    assert steps.pytest_counts(lines) == expected
    assert steps.pytest_counts(["Segmentation fault"]) == {}


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "80-real"), ((9, 0), "90a-real"), ((12, 0), "120a-real")]
)
def test_architecture(capability, expected):
    assert steps.architecture(capability) == expected


def test_profiler_table():
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","forward(Args, int)","GPU Speed Of Light","Duration","us","115.2"\n'
        '"0","forward(Args, int)","GPU Speed Of Light","DRAM Throughput","%","88.1"\n'
        '"0","forward(Args, int)","GPU Speed Of Light","Unknown","","1"\n'
        '"1","backward","Launch Statistics","Registers Per Thread","register/thread","127"\n'
    )
    assert profiling.kernels_of(text) == [
        {
            "kernel": "forward(Args, int)",
            "metrics": {"Duration": "115.2 us", "DRAM Throughput": "88.1 %"},
        },
        {"kernel": "backward", "metrics": {"Registers Per Thread": "127 register/thread"}},
    ]
    assert profiling.kernels_of("==ERROR== no permission") == []


def test_a_checkout_without_git(tmp_path):
    assert measuring_steps.commit_of(tmp_path) == ("unknown", None)


# ---- the stage that measures


class Scripted(steps.Workplace):
    """A place where each program writes a row and ends with the next exit code."""

    def run(self, *command, seconds, **options):
        count, path = len(self.environment["commands"]), command[command.index("--out") + 1]
        self.environment["commands"].append(command)
        rows.append(path, {"case": f"case {count}", "ours": {"us": 1.0}})
        return processes.Outcome(self.environment["exit_codes"][count], ["bye"], 0.1)


def test_a_lost_device_is_followed_by_another_process(tmp_path):
    codes = [rows.LOST_DEVICE, rows.LOST_DEVICE, 0]
    place = Scripted(tmp_path, {"commands": [], "exit_codes": codes})
    details = measuring_steps.bench(place, seconds=100)
    assert len(place.environment["commands"]) == 3
    assert [row["case"] for row in details["rows"]] == ["case 0", "case 1", "case 2"]
    assert "window_attention 2x2 forward, bfloat16, 32768" in details["not_reached"]


def test_rows_survive_a_killed_benchmark(tmp_path):
    place = Scripted(tmp_path, {"commands": [], "exit_codes": [None]})
    with pytest.raises(OverranError) as caught:
        measuring_steps.bench(place, seconds=100)
    assert len(caught.value.details["rows"]) == 1


def test_rows_of_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, {"case": "a", "ours": {}})
    rows.append(path, {"case": "b", "lost_device": "flex", "message": "gone"})
    path.write_text(path.read_text() + '{"case": "c", "ou')
    assert rows.read(path) == ([{"case": "a", "ours": {}}], {"b": {"flex": "gone"}})
    assert rows.read(tmp_path / "none") == ([], {})
