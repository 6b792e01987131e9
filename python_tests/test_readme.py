# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, its numbers and commands are true; so is what docs/models.md says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from specs import SPECS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

RATIOS = {"eager SDPA": 1.2, "eager matmul": 0.9, "compiled": 1.5, "copy of the same bytes": 0.8}
ENVIRONMENT = dict.fromkeys(
    ("date", "logical_cpus", "cpu", "cpu_isa", "threads", "torch", "commit"), "x"
)
README = (ROOT / "README.md").read_text()


def test_python_examples_run_in_order_and_print_what_is_shown(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)  # that is the point of this test
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert capsys.readouterr().out == shown
    assert namespace["qkv"].grad.isfinite().all()
    assert namespace["grids"].num_tokens == 2032
    assert namespace["y"].shape == (2032, 16, 72)
    assert namespace["merged"].shape == (508, 1152)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_operator_is_listed():
    page = (ROOT / "docs" / "operators.md").read_text()
    for name in SPECS:
        assert f"`{name}" in page, f"docs/operators.md does not mention {name}"


def test_numbers_are_those_of_the_newest_results():
    report = ROOT / "benchmarks" / "report.py"
    done = subprocess.run([sys.executable, str(report), "--check"], check=False)
    assert done.returncode == 0, "run `python benchmarks/report.py`"


def test_tables_name_the_worst_of_the_alternatives_and_the_time(tmp_path):
    rows = [
        {"case": "a", "dtype": "float32", "ours_ms": 2.0, "ratios": RATIOS},
        {"case": "b", "dtype": "float32", "ours_ms": 3.0, "ratios": {}},
    ]
    path = tmp_path / "cpu_x.json"
    path.write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    lines = report.cpu_block(path).splitlines()
    assert lines[2] == "| a | float32 | 2.0 ms | 0.9x (matmul) | 1.5x |"
    assert lines[3] == "| b | float32 | 3.0 ms |  |  |"
    assert report.cpu_block(path, [("b", "float32")]).splitlines()[2] == lines[3]
    ways = [("ours", 7.2, 1.0), ("theirs", 3.6, 0.5)]
    rows = [
        {
            "dtype": dtype,
            "image": [64, 32],
            "way": way,
            "tokens": 4,
            "first_token_ms": ms,
            "ratio": r,
        }
        for dtype in ("float32", "bfloat16")
        for way, ms, r in ways
    ]
    path.write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    head, rule, _, line, *_ = report.ttft_block(path, (64, 32)).splitlines()
    assert head == "| image, px | encoder | visual tokens | float32 | bfloat16 |"
    assert line == "| 64 x 32 | theirs | 4 | 4 ms (0.50x) | 4 ms (0.50x) |"
    assert {text.count("|") for text in (head, rule, line)} == {6}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.slow
@pytest.mark.parametrize("page", ["models", "vlms", "works_with"])
def test_page_is_up_to_date(page):
    command = [sys.executable, ROOT / "docs" / f"{page}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_models_page_has_no_unexplained_refusal():
    rows = [line.split("|") for line in (ROOT / "docs" / "models.md").read_text().splitlines()]
    rows = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 7]
    for kind, total, supported, packed, reason in rows[2:]:
        assert bool(reason) == (int(total) != int(supported)), kind
        assert packed == supported, kind
    assert sum(int(row[2]) for row in rows[2:]) == 336
