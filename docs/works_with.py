# SPDX-License-Identifier: Apache-2.0
"""Write docs/works_with.md: the tools that models with a compressor are tested with, by version.

python docs/works_with.py            # write the page
python docs/works_with.py --check    # fail where it is out of date
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from _page import write_or_check

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "python_tests" / "test_works_with.py"
PINS = HERE.parent / "requirements-dev.txt"

HEAD = """# Works with

Each line is a test of `python_tests/test_works_with.py`, on small models with random weights, with
the versions of `requirements-dev.txt`. `python docs/works_with.py` writes this page. Other files
test DDP, FSDP2 and DTensor (`test_distributed.py`), `torch.compile` (`test_families_lifecycle.py`),
`save_pretrained` and `from_pretrained` (`test_hf_pretrained.py`).

| tool | version | what holds |
|---|---|---|
"""


def page() -> str:
    """Return the text of the page."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", PINS.read_text(), re.MULTILINE))
    rows = []
    for node in ast.parse(TESTS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            tool, _, holds = ast.get_docstring(node).partition(": ")
            rows.append(f"| {tool} | {pins[tool]} | {holds[0].upper()}{holds[1:]} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.exit(write_or_check(__file__, __doc__, page))
