# SPDX-License-Identifier: Apache-2.0
"""Every example runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from uhd_ops.nn import ABLATION

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_one_op():
    output = run(sys.executable, EXAMPLES / "01_one_op.py")
    assert "window_attention: (39, 2, 8) -> (39, 2, 8)" in output
    assert "compiled equals eager: True" in output


def test_retrofit_timm_vit():
    output = run(sys.executable, EXAMPLES / "02_retrofit_timm_vit.py", "test_vit")
    assert "tokens out: (1, 785, 64) -> (1, 197, 64)" in output
    assert "bit for bit: True" in output


def test_ops_in_your_model():
    output = run(sys.executable, EXAMPLES / "03_ops_in_your_model.py")
    assert "tokens: 131 -> 36, grids: [(8, 12), (5, 7)] -> [(4, 6), (3, 4)]" in output
    assert "cu_seqlens of the merged tokens: [0, 24, 36]" in output
    assert "block-major tokens, largest difference: " in output


def test_warm_start(tmp_path):
    script = EXAMPLES / "04_warm_start.py"
    output = run(sys.executable, script, "--quick", "--seeds", "1", "--out", tmp_path)
    (results,) = tmp_path.glob("warm_start_*.json")
    record = json.loads(results.read_text())
    assert record["steps"] == [0, 1, 2, 3, 6]
    curves = {(row["arm"], row["start"]): row["correct"] for row in record["rows"]}
    assert {arm for arm, _ in curves} > set(ABLATION)
    assert all(0 <= n <= 50 for correct in curves.values() for n in correct)
    assert {len(correct) for correct in curves.values()} == {5}
    full = curves["window attention + reused MLP", "reused"]
    tied = curves["window attention + reused MLP, tied", "reused"]
    assert full[0] == tied[0]  # the same function, before it is trained
    assert all(f"| {arm} | {start} | " in output for arm, start in curves)
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_merge_stability(tmp_path):
    script = EXAMPLES / "06_merge_stability.py"
    output = run(sys.executable, script, "--quick", "--seeds", "1", "--out", tmp_path)
    (results,) = tmp_path.glob("stability_*.json")
    rows = {(row["arm"], row["start"]): row for row in json.loads(results.read_text())["rows"]}
    assert rows.keys() == {
        ("untouched", None),
        *((pool, n) for n in (1, 4, 10, 18, 27) for pool in ("mean", "adaptive", "unshuffle")),
    }
    for n in (1, 4, 10, 18, 27):
        mean, adaptive = rows["mean", n], rows["adaptive", n]
        # The same function, before training; an MLP that nothing has trained is another.
        assert mean["similarity"] == pytest.approx(adaptive["similarity"], abs=1e-5)
        assert mean["similarity"] > rows["unshuffle", n]["similarity"]
        assert 0 < mean["redundancy"] <= 1
    # The mean and the norm behind the last block change places, and nothing else does.
    assert rows["mean", 27]["similarity"] > 0.9
    assert "| 2 of 12 (paper: 4 of 27) | adaptive | " in output


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "01_one_op.py",
        "02_retrofit_timm_vit.py",
        "03_ops_in_your_model.py",
        "04_warm_start.py",
        "05_train_mllm.py",
        "06_merge_stability.py",
        "experiments.py",
        "pages.py",
    }


def test_demo_picture():
    path = EXAMPLES / "images" / "picos_de_europa.jpg"
    with Image.open(path) as image:
        assert image.width >= 2000
        assert image.height >= 1500
    assert path.stat().st_size < 2_000_000
    credits = (EXAMPLES / "images" / "README.md").read_text()
    for picture in (EXAMPLES / "images").glob("*.jpg"):
        assert f"`{picture.name}`" in credits


def test_demo(tmp_path):
    """The script as `make demo` calls it, with a small model in front of its own arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --model test_vit --max-slices 2\n')
    python.chmod(0o755)
    output = run("bash", EXAMPLES / "demo.sh", python, tmp_path / "out")
    assert "RANDOM weights" in output
    summary = json.loads((tmp_path / "out" / "picos_de_europa" / "summary.json").read_text())
    assert summary["plan"]["image_size"] == [3264, 2448]
    for file in summary["files"]:
        assert Path(file).is_file()


@pytest.mark.parametrize("script", ["demo.sh"])
def test_demo_needs_a_python(script):
    result = subprocess.run(
        ["bash", EXAMPLES / script], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "usage: examples/demo.sh PYTHON" in result.stderr
