# SPDX-License-Identifier: Apache-2.0
"""Times that were predicted before the first run: computed, never measured.

From the bytes that must move over 3.0 TB/s (H100) or 4.3 TB/s (H200), the products over 800
TFLOP/s, and the share of those ceilings that the design of each kernel should reach
(benchmarks/NOTES.md). They hold for 32768 tokens, C = 1152, 16 heads, hidden size 4304, bfloat16.
"""

from __future__ import annotations

from gpu.cases import ATTENTION, BACKWARD, BOTH, DENSE, FORWARD, NORM, TIED, TILES

SOURCE = {"H100": "H100, computed", "H200": "H200, computed"}

# (operator, direction, window): microseconds on an H100, on an H200.
PREDICTED_US: dict[tuple[str, str, int], tuple[int, int]] = {
    (ATTENTION, FORWARD, 2): (115, 84),
    (ATTENTION, BACKWARD, 2): (205, 150),
    (ATTENTION, FORWARD, 8): (130, 105),
    (ATTENTION, BACKWARD, 8): (260, 210),
    (ATTENTION, FORWARD, 16): (185, 170),
    (NORM, FORWARD, 2): (66, 48),
    (NORM, BACKWARD, 2): (98, 70),
    (TIED, FORWARD, 2): (790, 735),
    (TIED, BOTH, 2): (2350, 2205),
    (DENSE, FORWARD, 2): (2480, 2460),
    (DENSE, BOTH, 2): (7430, 7390),
}
# The weights do not depend on the tokens, so neither does this; only the H100 was computed.
TILES_US = {FORWARD: 85, BACKWARD: 40}


def predicted_us(row: dict, gpu: str) -> tuple[int, str] | None:
    """Return the predicted time of a row and where it comes from; None where there is none."""
    if row["dtype"] != "bfloat16":
        return None
    model = next((name for name in SOURCE if name in gpu), None)
    if row["op"] == TILES and model == "H100":
        return TILES_US[row["direction"]], SOURCE[model]
    key = (row["op"], row["direction"], row["window"])
    if model is None or row["tokens"] != 32768 or key not in PREDICTED_US:
        return None
    return PREDICTED_US[key][list(SOURCE).index(model)], SOURCE[model]
