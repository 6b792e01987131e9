# SPDX-License-Identifier: Apache-2.0
"""What a call costs before its kernel runs: operators against scaled_dot_product_attention.

    python benchmarks/bench_host.py                    a table
    python benchmarks/bench_host.py --json FILE        and the numbers, machine, versions, commit
    python benchmarks/bench_host.py --device cuda      tensors on a GPU

Tensors hold 16 tokens, so that nearly all of a call is Python, dispatcher and glue. A number is the
CPU time of the calling thread, the least of many rounds in which all calls take turns: load of the
machine adds to neither. Ratios are within a group: to one call of scaled_dot_product_attention of
that size, for EarlyCompressor to the timm block that it was made from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import harness
import torch
from timm.models.vision_transformer import Block
from torch.nn.functional import scaled_dot_product_attention

import uhd_ops
from uhd_ops.nn import EarlyCompressor

SIDE, HEADS, HEAD_DIM = 4, 2, 8
TOKENS, CHANNELS = SIDE * SIDE, HEADS * HEAD_DIM
GROUPS = ("no gradients", "forward with gradients", "backward")
SDPA, BLOCK = "scaled_dot_product_attention", "timm's block"
COMPRESSOR = "EarlyCompressor"

Calls = dict[str, Callable[[], torch.Tensor]]


def calls(device: str = "cpu", gradients: bool = False) -> Calls:
    """Return every call by name, the two that others are compared with first."""

    def randn(*shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(device).requires_grad_(gradients)

    grids = uhd_ops.PackedGrids([(SIDE, SIDE)])
    heads = [randn(SIDE, HEADS, SIDE, HEAD_DIM) for _ in range(3)]
    q, k, v = (randn(TOKENS, HEADS, HEAD_DIM) for _ in range(3))
    qkv, x, logits = randn(TOKENS, 3, HEADS, HEAD_DIM), randn(TOKENS, CHANNELS), randn(TOKENS, 16)
    weights = randn(32, CHANNELS), randn(32), randn(CHANNELS, 32), randn(CHANNELS)
    norm = {"norm_weight": randn(4 * CHANNELS), "norm_bias": randn(4 * CHANNELS)}
    block = Block(CHANNELS, HEADS, qkv_bias=True).to(device).eval().requires_grad_(gradients)
    compressor = EarlyCompressor.from_block(block, form="tied").requires_grad_(gradients)
    batch = randn(1, TOKENS, CHANNELS)
    return {
        SDPA: lambda: scaled_dot_product_attention(*heads),
        BLOCK: lambda: block(batch),
        "window_attention": lambda: uhd_ops.window_attention(q, k, v, grids),
        "window_attention_qkvpacked": lambda: uhd_ops.window_attention_qkvpacked(qkv, grids),
        "window_mean": lambda: uhd_ops.window_mean(x, grids),
        "window_pool": lambda: uhd_ops.window_pool(x, logits, grids),
        "pixel_unshuffle": lambda: uhd_ops.pixel_unshuffle(x, grids),
        "tile_vector": lambda: uhd_ops.tile_vector(weights[1], 4),
        "pixel_unshuffle_mlp": lambda: uhd_ops.pixel_unshuffle_mlp(x, grids, *weights, **norm),
        COMPRESSOR: lambda: compressor(x, grids),
    }


def microseconds(
    functions: dict[str, Callable[[], object]], rounds: int, repeat: int, device: str
) -> dict[str, float]:
    """Return the least time of a call, each of them timed ``repeat`` calls at a time."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if device != "cpu":
                torch.cuda.synchronize(device)  # or a full queue would hold the host
            start = time.thread_time_ns()
            for _ in range(repeat):
                function()
            least[name] = min(least[name], (time.thread_time_ns() - start) / repeat / 1e3)
    return least


def backward_of(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return the backward pass of a call, to all leaves, whose gradients are thrown away."""
    out = forward()
    edges, leaves, seen = [out.grad_fn], [], set()
    while edges:
        node = edges.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        edges += [edge for edge, _ in node.next_functions]
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def measure(device: str = "cpu", rounds: int = 60, repeat: int = 150) -> list[dict]:
    """Return a row for every call in every group, with its ratio to what it is compared with."""
    with_gradients = calls(device, gradients=True)
    groups = {
        GROUPS[0]: calls(device),
        GROUPS[1]: with_gradients,
        GROUPS[2]: {name: backward_of(call) for name, call in with_gradients.items()},
    }
    rows = []
    for group, functions in groups.items():
        with torch.set_grad_enabled(group != GROUPS[0]):
            times = microseconds(functions, rounds, repeat, device)
        for name, us in times.items():
            rival = BLOCK if name == COMPRESSOR else SDPA
            ratio = us / times[rival]
            rows.append({"group": group, "call": name, "us": us, "rival": rival, "ratio": ratio})
    return rows


def report(rows: list[dict]) -> str:
    """Return a table, a line for each call."""
    lines = [" " * 28 + "".join(f"{group:>26}" for group in GROUPS)]
    for name in dict.fromkeys(row["call"] for row in rows):
        cells = [f"{row['us']:.1f} us {row['ratio']:6.2f}x" for row in rows if row["call"] == name]
        lines.append(f"{name:28}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write the numbers where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--device", default="cpu", help="where the tensors are")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(options.device, options.rounds)
    print(report(rows))
    if options.json:
        facts = harness.environment()  # before there is a new file, which would be a change
        with open(options.json, "w") as file:
            json.dump({"environment": facts, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
