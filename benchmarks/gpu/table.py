# SPDX-License-Identifier: Apache-2.0
"""From what was timed to what it means: rates, shares of the ceiling, ratios, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu.predictions import predicted_us

HEADER = ("case", "us", "rate", "of ceiling", "best rival", "predicted", "verdict")


def rate(row: Mapping) -> tuple[float, str]:
    """Return how fast ours is, and the unit: TFLOP/s for matrix products, else GB/s."""
    us = row["ours"]["us"]
    if row["compute_bound"]:
        return row["flops"] / us / 1e6, "TFLOP/s"
    return row["bytes_moved"] / us / 1e3, "GB/s"


def share_of_ceiling(row: Mapping, ceilings: Mapping) -> float | None:
    """Return ours as a part of what the GPU was measured to do; None where that is unknown."""
    value, unit = rate(row)
    if unit == "GB/s":
        ceiling = ceilings.get("copy_gb_per_s")
    else:
        ceiling = ceilings.get("gemm_tflop_per_s", {}).get(row["dtype"])
    return value / ceiling if ceiling else None


def best_rival(row: Mapping) -> tuple[str, float] | None:
    """Return the fastest rival that computes the same function, and its time over ours."""
    same = {n: r["us"] for n, r in row["rivals"].items() if r["same_function"]}
    if not same:
        return None
    name = min(same, key=same.get)
    return name, same[name] / row["ours"]["us"]


def verdict(row: Mapping, gpu: str) -> str:
    """Say in a few words whether ours is faster than its rivals and as fast as predicted."""
    if "ours" not in row:
        return row["error"]
    words = []
    rival = best_rival(row)
    if rival is not None and rival[1] < 1:
        # Two timings of the same thing differ by the spread, so less than that is no difference.
        tied = 1 - rival[1] <= row["ours"]["spread"]
        words.append("ties" if tied else f"LOSES to {rival[0]}")
    expected = predicted_us(row, gpu)
    if expected is not None:
        excess = row["ours"]["us"] / expected[0] - 1
        words.append(f"{excess:+.0%} of predicted" if excess > 0 else "as predicted or better")
    return ", ".join(words) or ("faster than every rival" if rival else "no rival")


def line_of(row: Mapping, ceilings: Mapping, gpu: str) -> tuple[str, ...]:
    """Return the cells of one row of the table."""
    if "ours" not in row:
        return (row["case"], "", "", "", "", "", verdict(row, gpu))
    value, unit = rate(row)
    share, rival, expected = (
        share_of_ceiling(row, ceilings),
        best_rival(row),
        predicted_us(row, gpu),
    )
    return (
        row["case"],
        f"{row['ours']['us']:.1f}",
        f"{value:.0f} {unit}",
        "" if share is None else f"{share:.0%}",
        "" if rival is None else f"{rival[1]:.2f}x ({rival[0]})",
        "" if expected is None else f"{expected[0]} ({expected[1]})",
        verdict(row, gpu),
    )


def text_table(rows: Sequence[Mapping], ceilings: Mapping, gpu: str) -> str:
    """Return the table that ends a run: a line per case, columns aligned."""
    lines = [HEADER, *(line_of(row, ceilings, gpu) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
