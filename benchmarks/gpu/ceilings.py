# SPDX-License-Identifier: Apache-2.0
"""Measure what the GPU can do at most here and now, and print it as one line of JSON.

Shares are of these numbers, not of a data sheet's.
"""

from __future__ import annotations

import json
import statistics

import torch

COPY_BYTES = 8 * 10**9  # read and written together; many times any cache
GEMM_SIDE = 8192
DTYPES = ("bfloat16", "float16", "float32")
REPEATS = {"copy": 15, "bfloat16": 20, "float16": 20, "float32": 5}


def median_seconds(call, repeats: int) -> float:
    """Median time of one call by CUDA events, after two calls that do not count."""
    times = []
    for i in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_gb_per_s() -> float:
    """Bandwidth of a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return COPY_BYTES / median_seconds(lambda: target.copy_(source), REPEATS["copy"]) / 1e9


def gemm_tflop_per_s(dtype: str) -> float:
    """Rate of torch's matrix product on random numbers; on zeros it would look faster."""
    a, b = (
        torch.randn(GEMM_SIDE, GEMM_SIDE, dtype=getattr(torch, dtype), device="cuda")
        for _ in range(2)
    )
    out = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), REPEATS[dtype])
    return 2 * GEMM_SIDE**3 / seconds / 1e12


def measure() -> dict[str, object]:
    """Return the ceilings of device 0."""
    found: dict[str, object] = {"copy_gb_per_s": round(copy_gb_per_s(), 1)}
    torch.cuda.empty_cache()
    found["gemm_tflop_per_s"] = {name: round(gemm_tflop_per_s(name), 1) for name in DTYPES}
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
