# SPDX-License-Identifier: Apache-2.0
"""Read Nsight Compute's CSV."""

from __future__ import annotations

import csv
import io

METRICS = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L1/TEX Hit Rate",
    "L2 Hit Rate",
    "Registers Per Thread",
)


def kernels_of(text: str) -> list[dict[str, object]]:
    """Return one record per kernel launch: its name and ``{metric: "value unit"}``.

    Args:
        text: What ``ncu --csv`` wrote: lines of its own, then a table with one metric per row.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    launches: dict[str, dict[str, object]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        if row.get("Metric Name") not in METRICS:
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}})
        value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
        # Two sections show some metrics, in different units; the first is the more readable one.
        launch["metrics"].setdefault(row["Metric Name"], value)
    return list(launches.values())
