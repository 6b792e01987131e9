# SPDX-License-Identifier: Apache-2.0
"""The scripts of the gallery and the notebooks run; the diagram of the docs is up to date."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCRIPTS = sorted((DOCS / "gallery").glob("*.py"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.fixture
def elsewhere(monkeypatch):
    """Go where sphinx-gallery and Jupyter run them: into their own folder."""
    return monkeypatch.chdir


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_gallery_has_the_format_of_sphinx(script):
    text = script.read_text()
    title, line = ast.get_docstring(ast.parse(text)).splitlines()[:2]
    assert line == "=" * len(title)
    cells = re.split(r"^# %%\n", text, flags=re.MULTILINE)
    assert len(cells) > 1
    assert all(cell.startswith("# ") for cell in cells[1:])  # a cell begins with what it shows


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_gallery(script, elsewhere, monkeypatch):
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.get_fignums())))
    elsewhere(script.parent)
    runpy.run_path(str(script))
    assert len(shown) == script.read_text().count("plt.show()") > 0
    assert shown == sorted(set(shown))  # something new to show each time


def test_gallery_is_complete():
    names = [script.stem for script in SCRIPTS]
    assert names == [
        "plot_1_slices",
        "plot_2_merge",
        "plot_3_attention",
        "plot_4_costs",
        "plot_5_ratios",
        "plot_6_diagram",
    ]
    assert [path.stem for path in NOTEBOOKS] == ["encode_a_large_image", "retrofit_a_timm_vit"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, elsewhere):
    """Its cells run one after the other in one namespace, which is what a kernel does."""
    document = json.loads(notebook.read_text())
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    cells = document["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) - len(code) == sum(cell["cell_type"] == "markdown" for cell in cells)
    elsewhere(notebook.parent)
    namespace = {"__name__": "__main__"}
    for index, cell in enumerate(code):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {index}", "exec"), namespace)
    assert pyplot.get_fignums()
    assert isinstance(namespace["vit"], torch.nn.Module)


def test_the_diagram_is_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diagram.py", "--check"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(DOCS / "diagram.py"), run_name="__main__")
    assert exit_info.value.code == 0, capsys.readouterr().out
