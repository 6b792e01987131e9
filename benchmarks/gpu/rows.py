# SPDX-License-Identifier: Apache-2.0
"""The benchmark's file: one JSON object per line, appended as soon as its case is measured."""

from __future__ import annotations

import json
from pathlib import Path

LOST_DEVICE = 3  # exit code of the benchmark: a new process can go on where it ended


def append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read(path: Path) -> tuple[list[dict], dict[str, dict[str, str]]]:
    """Read what a file has; a line that was cut off in the middle is left out.

    Returns:
        The rows, and ``{case: {implementation: reason}}`` of those that lost the device and must
        not run again.
    """
    rows: list[dict] = []
    lost: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "lost_device" in row:
            lost.setdefault(row["case"], {})[row["lost_device"]] = row["message"]
        else:
            rows.append(row)
    return rows, lost
