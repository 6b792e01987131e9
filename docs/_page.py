# SPDX-License-Identifier: Apache-2.0
"""What the scripts that write a page share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def write_or_check(script: str, doc: str, make: Callable[[], str]) -> int:
    """Write the page beside a script, or compare it; return the exit status.

    Args:
        script: Path of the script; its page has the same name, and ends in ``.md``.
        doc: Docstring of the script.
        make: Returns the text of the page.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    arguments = parser.parse_args()
    path = Path(script).with_suffix(".md")
    page = make()
    if not arguments.check:
        path.write_text(page)
    elif page != path.read_text():
        name = path.stem
        print(f"docs/{name}.md is out of date: run python docs/{name}.py", file=sys.stderr)
        return 1
    return 0
