# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow with tokens, windows, views and images, and beyond 2^31 elements.

    python benchmarks/bench_scale.py            everything; prints exponents, writes results/
    python benchmarks/bench_scale.py --quick    small sizes, to see that it runs; writes nothing

All of it on one thread. A time is CPU time of the process, the least of several calls. Memory is
what the resident set of the process grows by at its peak, in a call whose every larger allocation
is given back to the system: what the results take, and all that was needed on the way. An exponent
is the slope of a straight line through the logarithms; 1 is linear. ``step`` is the time per token
at the largest size over that at the best one: where arrays leave the processor's cache and come in
fresh pages, a token costs more by that, once, and not more and more.

Beyond 2^31 elements tensors are bfloat16. Their tokens are zeros that take no memory, but for a
last small view: its results must have the bits that it has alone, and the time is compared with
that of a thirty-second of the size.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch

import uhd_ops

CHANNELS, HEADS, HIDDEN = 64, 4, 256
PASSES = ("forward", "forward + backward")
NEEDED = 14 * 2**30  # bytes, for what lies beyond 2^31 elements
GiB, MiB = 2**30, 2**20


@dataclass(frozen=True)
class Sizes:
    """How large everything gets; that of ``--quick`` is tiny."""

    tokens: tuple[int, ...] = tuple(4**k for k in range(5, 11))
    views: tuple[int, ...] = (10, 100, 1000, 10_000)
    images: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    elements: int = 2**31
    seconds: float = 0.3  # for the calls of one time


QUICK = Sizes((4**4, 4**5), (2, 20), (10, 1000), 2**24, 0.0)

# ---- operators, as functions of tensors with one row per token, and of grids

Grids = list[tuple[int, int]]
_generator = torch.Generator().manual_seed(0)
_WEIGHTS = [
    torch.randn(shape, generator=_generator) / 8
    for shape in ((HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,))
]
_NORM = {"norm_weight": torch.ones(4 * CHANNELS), "norm_bias": torch.zeros(4 * CHANNELS)}


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, -1))


OPERATORS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "window_mean": (1, lambda x, grids: uhd_ops.window_mean(x, grids)),
    "window_pool": (2, lambda x, logits, grids: uhd_ops.window_pool(x, logits, grids)),
    "pixel_unshuffle": (1, lambda x, grids: uhd_ops.pixel_unshuffle(x, grids)),
    "reorder_tokens": (1, lambda x, grids: uhd_ops.reorder_tokens(x, grids, "block")),
    "window_attention": (
        3,
        lambda q, k, v, grids: uhd_ops.window_attention(_heads(q), _heads(k), _heads(v), grids),
    ),
    "pixel_unshuffle_mlp": (
        1,
        lambda x, grids: uhd_ops.pixel_unshuffle_mlp(x, grids, *_WEIGHTS, **_NORM),
    ),
    "view_attention": (
        3,
        lambda q, k, v, grids: uhd_ops.view_attention(_heads(q), _heads(k), _heads(v), grids),
    ),
}
"""How many tensors each takes, and what it does."""

PACKED = "window_attention_qkvpacked"
BEYOND: dict[str, tuple[int, int, Callable[..., torch.Tensor]]] = {
    name: (OPERATORS[name][0], 1024, OPERATORS[name][1])
    for name in ("window_mean", "window_pool", "pixel_unshuffle", "reorder_tokens")
}
BEYOND[PACKED] = (
    1,
    3 * 1024,
    lambda x, grids: uhd_ops.window_attention_qkvpacked(x.unflatten(-1, (3, 16, -1)), grids),
)
"""Those that also run on more than 2^31 elements, with the elements of a row in between."""


def call_of(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    grids: uhd_ops.PackedGrids,
    way: str,
    grad_out: torch.Tensor | None = None,
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return what is measured: the result, or the result and all gradients."""
    if way == PASSES[0]:
        return lambda: (torch.no_grad()(function)(*tensors, grids),)
    leaves = [x.detach().requires_grad_() for x in tensors]

    def both() -> tuple[torch.Tensor, ...]:
        out = function(*leaves, grids)
        grad = torch.ones_like(out) if grad_out is None else grad_out
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return both


# ---- time and memory


def seconds_of(call: Callable[[], object], budget: float, least_calls: int = 3) -> float:
    """Return the least CPU time of several calls."""
    call()  # tables are made once
    best, spent, count = math.inf, 0.0, 0
    while count < least_calls or (spent < budget and count < 100):
        start = time.process_time()
        call()
        took = time.process_time() - start
        best, spent, count = min(best, took), spent + took, count + 1
    return best


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_libc = ctypes.CDLL(None)


def _give_back_from(size: int) -> None:
    """Let glibc give pieces of so many bytes back to the system when they are freed."""
    _libc.mallopt(_M_MMAP_THRESHOLD, size)
    _libc.mallopt(_M_TRIM_THRESHOLD, 2 * size)
    _libc.malloc_trim(0)


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def growth_of(call: Callable[[], object]) -> int:
    """Return the bytes by which the resident set grows at its peak during a call."""
    _give_back_from(2**16)
    try:
        call()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    finally:
        _give_back_from(2**25)  # where glibc's own rule ends


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ---- what is measured


def over_tokens(sizes: Sizes) -> list[dict]:
    """Measure every operator on one view, 2 x 2 windows; view_attention on views of 16 x 16."""
    rows = []
    for name, (count, function) in OPERATORS.items():
        whole = [
            torch.randn(sizes.tokens[-1], CHANNELS, generator=_generator) for _ in range(count)
        ]
        layouts = []
        for tokens in sizes.tokens:
            one = [(math.isqrt(tokens),) * 2]
            layouts.append([(16, 16)] * (tokens // 256) if name == "view_attention" else one)
        rows += _rows("tokens", name, function, whole, layouts, sizes.tokens, sizes)
    return rows


def over_views(sizes: Sizes) -> list[dict]:
    """Measure operators on many ragged views of 4 to 256 tokens, and how grids are made."""
    chosen, rows = random.Random(0), []
    pairs = [(chosen.randint(2, 16), chosen.randint(2, 16)) for _ in range(sizes.views[-1])]
    layouts = [pairs[:count] for count in sizes.views]
    total = sum(height * width for height, width in pairs)
    for name, (count, function) in OPERATORS.items():
        whole = [torch.randn(total, CHANNELS, generator=_generator) for _ in range(count)]
        rows += _rows("views", name, function, whole, layouts, sizes.views, sizes)

    def make(pairs: Grids) -> None:
        uhd_ops.clear_caches()
        uhd_ops.PackedGrids(pairs).view_table(2, torch.device("cpu"))

    times = [seconds_of(lambda: make(pairs), sizes.seconds) for pairs in layouts]  # noqa: B023
    rows.append(_host_row("views", "PackedGrids and a table", sizes.views, times))
    return rows


def over_images(sizes: Sizes) -> list[dict]:
    """Measure the planners on the sizes of many images."""
    chosen = np.random.default_rng(0)
    sides = chosen.integers(100, 4000, (2, sizes.images[-1]))
    planned = [
        seconds_of(
            lambda: uhd_ops.plan_slices_batch(*sides[:, :count], max_patches=None),  # noqa: B023
            sizes.seconds,
        )
        for count in sizes.images
    ]
    tokens, counts = chosen.integers(1000, 10_000, 100_000).tolist(), sizes.images[:3]
    packed = [
        seconds_of(lambda: uhd_ops.pack_batches(tokens[:count], 20_000), sizes.seconds)  # noqa: B023
        for count in counts
    ]
    return [
        _host_row("images", "plan_slices_batch", sizes.images, planned),
        _host_row("images", "pack_batches", counts, packed),
    ]


def _rows(
    axis: str,
    name: str,
    function: Callable[..., torch.Tensor],
    whole: list[torch.Tensor],
    layouts: list[Grids],
    numbers: Sequence[int],
    sizes: Sizes,
) -> list[dict]:
    rows = []
    for way in PASSES:
        times, growths, tokens = [], [], []
        for pairs in layouts:
            grids = uhd_ops.PackedGrids(pairs)
            tokens.append(grids.num_tokens)
            call = call_of(function, [x[: tokens[-1]] for x in whole], grids, way)
            times.append(seconds_of(call, sizes.seconds))
            growths.append(growth_of(call))
        per_token = [1e9 * seconds / n for seconds, n in zip(times, tokens, strict=True)]
        # Below that it is pages and the heap of the process.
        seen = [(n, size) for n, size in zip(tokens, growths, strict=True) if size >= MiB]
        rows.append(
            {
                "axis": axis,
                "call": name,
                "pass": way,
                axis: list(numbers),
                "tokens": tokens,
                "ns_per_token": per_token,
                "peak_bytes": growths,
                "time_exponent": exponent(tokens, times),
                "memory_exponent": exponent(*zip(*seen, strict=True)) if len(seen) > 1 else None,
                "step": per_token[-1] / min(per_token),
            }
        )
        print(line_of(rows[-1]), flush=True)
    return rows


def _host_row(axis: str, name: str, numbers: Sequence[int], times: Sequence[float]) -> dict:
    each = [1e9 * seconds / n for seconds, n in zip(times, numbers, strict=True)]
    row = {
        "axis": axis,
        "call": name,
        "pass": "",
        axis: list(numbers),
        "ns_each": each,
        "time_exponent": exponent(numbers, times),
        "memory_exponent": None,
        "step": each[-1] / min(each),
    }
    print(line_of(row), flush=True)
    return row


# ---- beyond 2^31 elements


def _zeros(rows: int, columns: int) -> torch.Tensor:
    """Return zeros that take no memory until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, 2 * rows * columns, flags=flags)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(rows, columns)


LAST = (62, 61)  # ragged, too


def _problem(count: int, columns: int, elements: int) -> tuple[list[torch.Tensor], Grids]:
    """Return tokens of so many elements in a first view, and random ones of a last view."""
    grids = [(-(-elements // columns // 1024), 1024), LAST]
    tokens, last = sum(height * width for height, width in grids), math.prod(LAST)
    tensors = [_zeros(tokens, columns) for _ in range(count)]
    for x in tensors:
        x[-last:] = torch.randn(last, columns, generator=_generator)
    return tensors, grids


def beyond_32_bits(sizes: Sizes) -> list[dict]:
    """Run operators on more than 2^31 elements.

    Raises:
        AssertionError: The last view has other results than alone.
    """
    rows = []
    for name, (count, columns, function) in BEYOND.items():
        for way in PASSES:
            results = []
            for elements in (sizes.elements // 32, sizes.elements):
                tensors, pairs = _problem(count, columns, elements)
                results.append(_one_beyond(name, function, tensors, pairs, way))
            small, large = results
            ratio = large["elements"] / small["elements"]
            rows.append(
                {
                    "axis": "elements",
                    "call": name,
                    "pass": way,
                    **large,
                    "time_exponent": math.log(large["seconds"] / small["seconds"], ratio),
                    "memory_exponent": math.log(large["peak_bytes"] / small["peak_bytes"], ratio),
                    "step": None,
                }
            )
            print(line_of(rows[-1]), flush=True)
    return rows


def _one_beyond(
    name: str,
    function: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
    pairs: Grids,
    way: str,
) -> dict:
    grids, last = uhd_ops.PackedGrids(pairs), math.prod(LAST)
    alone = [x[-last:].clone() for x in tensors]
    out = function(*alone, uhd_ops.PackedGrids(pairs[-1:]))
    grad = torch.randn(out.shape, generator=_generator).to(out.dtype)
    wanted = call_of(function, alone, uhd_ops.PackedGrids(pairs[-1:]), way, grad)()
    rows = grids.num_windows(2) if len(out) < last else grids.num_tokens
    grad_out = _zeros(rows, grad[0].numel())
    grad_out[-len(grad) :] = grad.flatten(1)
    call = call_of(function, tensors, grids, way, grad_out.view(-1, *grad.shape[1:]))
    _give_back_from(2**16)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _resident("VmRSS"), time.process_time()
    found = call()
    seconds, peak = time.process_time() - start, _resident("VmHWM") - before
    for tensor, right in zip(found, wanted, strict=True):
        assert torch.equal(tensor[-len(right) :], right), f"{name}, {way}: the last view is wrong"
    return {
        "elements": tensors[0].numel(),
        "tokens": grids.num_tokens,
        "seconds": seconds,
        "ns_per_token": 1e9 * seconds / grids.num_tokens,
        "peak_bytes": peak,
    }


# ---- report


def line_of(row: dict) -> str:
    """Return a line for the terminal."""
    numbers = row[row["axis"]]
    ends = f"{numbers[0]:,} to {numbers[-1]:,}" if isinstance(numbers, list) else f"{numbers:,}"
    each = row.get("ns_per_token", row.get("ns_each"))
    times = " ".join(f"{ns:.0f}" for ns in each) if isinstance(each, list) else f"{each:.0f}"
    memory, step = row["memory_exponent"], row["step"]
    return (
        f"{row['call'] + ' ' + row['pass']:42} {ends:>22} {row['axis']:8}"
        f" time^{row['time_exponent']:.2f}"
        + (f" memory^{memory:.2f}" if memory is not None else " " * 12)
        + f"  ns each: {times}"
        + (f", step {step:.1f}" if step else "")
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and store the rows under ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if not options.quick and free < NEEDED:
        parser.error(f"{NEEDED / GiB:.0f} GiB of memory are needed, {free / GiB:.1f} are free")
    torch.set_num_threads(1)
    start = time.perf_counter()
    _give_back_from(2**25)
    rows = [*over_tokens(sizes), *over_views(sizes), *over_images(sizes), *beyond_32_bits(sizes)]
    print(f"{time.perf_counter() - start:.0f} s")
    if not options.quick:
        harness.store("scale", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
