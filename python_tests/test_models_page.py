# SPDX-License-Identifier: Apache-2.0
"""docs/models.md says what the library does with every vision transformer of timm."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_page_is_up_to_date():
    command = [sys.executable, DOCS / "models.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_page_has_no_unexplained_refusal():
    rows = [line.split("|") for line in (DOCS / "models.md").read_text().splitlines()]
    rows = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 7]
    for kind, total, supported, packed, reason in rows[2:]:
        assert bool(reason) == (int(total) != int(supported)), kind
        assert packed == supported, kind
    assert sum(int(row[2]) for row in rows[2:]) == 336
