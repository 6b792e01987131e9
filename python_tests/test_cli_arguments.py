# SPDX-License-Identifier: Apache-2.0
"""The command line until a command runs: no torch is imported, and choices are those that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from uhd_ops.cli import _bench, _models, _paper, _variants
from uhd_ops.cli.arguments import commands, main, types
from uhd_ops.nn import early_compressor
from uhd_ops.slicing import native_resolution

CLI = Path(commands.__file__).resolve().parents[1]
# What is installed as uhd_ops_cli.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(CLI)!r})
import arguments
try:
    arguments.main(sys.argv[1:])
finally:
    heavy = {{"torch", "numpy", "uhd_ops"}} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in commands.COMMANDS)])
def test_help_imports_nothing(words, capsys):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().out == done.stdout


def test_a_wrong_argument_imports_nothing():
    command = [sys.executable, "-c", PROGRAM, "flops", "--layer", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("error: argument --layer: must be an integer, got 'x'\n")


def test_choices_are_those_that_exist():
    assert tuple(_bench.OPS) == commands.OPERATORS
    assert tuple(_bench.DTYPES) == commands.DTYPES
    assert tuple(_models.DTYPES) == commands.MODEL_DTYPES
    assert tuple(_paper.PAPERS) == commands.PAPERS
    assert list(types.VARIANTS) == list(_variants.VARIANTS)
    for name in ("ATTENTIONS", "MLPS", "FORMS", "POOLS"):
        assert getattr(commands, name) == getattr(early_compressor, name)
    assert native_resolution.DEFAULT_MAX_TOKENS == commands.NATIVE_TOKENS
    assert native_resolution.LEAST_MAX_TOKENS == types.LEAST_NATIVE_TOKENS
