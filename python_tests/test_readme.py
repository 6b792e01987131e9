# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, its numbers and commands are true; so is what docs/models.md says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from specs import SPECS

import uhd_ops

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run_in_order(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)  # that is the point of this test
    printed = capsys.readouterr().out
    tokens_in, tokens_out = map(int, re.search(r"(\d+) tokens in, (\d+) out", printed).groups())
    assert tokens_in == namespace["plan"].num_tokens
    assert tokens_out * 4 == tokens_in
    assert namespace["qkv"].grad.isfinite().all()
    assert namespace["merged"].shape == (1024, 1152)  # of the last block
    assert namespace["merged"][:508].all(1).all()
    assert not namespace["merged"][508:].any()


def test_shapes_in_comments_are_true():
    grids = uhd_ops.PackedGrids([(32, 32), (28, 36)])
    assert "# (2032, 16, 72)" in README
    assert grids.num_tokens == 2032
    assert "# (508, 1152)" in README
    assert grids.num_windows(2) == 508
    assert 16 * 72 == 1152


def test_every_operator_is_listed():
    for name in SPECS:
        assert f"`{name}" in README, f"README does not mention {name}"


def test_numbers_are_those_of_the_newest_results():
    report = ROOT / "benchmarks" / "report.py"
    done = subprocess.run([sys.executable, str(report), "--check"], check=False)
    assert done.returncode == 0, "run `python benchmarks/report.py`"


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
