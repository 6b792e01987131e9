# SPDX-License-Identifier: Apache-2.0
"""Every operator against the strongest ways to write it in PyTorch.

    python benchmarks/bench_ops.py                      all cases; prints ratios, writes results/
    python benchmarks/bench_ops.py -k attention         some cases; writes nothing
    pytest benchmarks/bench_ops.py --benchmark-json F   pytest-benchmark's own report

Each case first checks ours and every rival against the definition in float64, then times them
interleaved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import harness
import pytest
import torch
from rich.console import Console
from rich.table import Table

import uhd_ops
from uhd_ops.cli import rivals

# What tests know about the operators, benchmarks use.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
from specs import SPECS

GRID = (70, 70)
CHANNELS, HEADS, HIDDEN = 1152, 16, 4304
GRIDS = uhd_ops.PackedGrids([GRID])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Half-precision rivals round after every step; this only has to tell a right result from a wrong
# one.
SANE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

ROWS: list[dict] = []

pytestmark = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def check(name, result, expected, dtype):
    """The relative error in the Euclidean norm must be small before a time means anything."""
    error = (result.detach().double() - expected).norm() / expected.norm()
    assert error < SANE[dtype], f"{name}: relative error {error:.2e}"


def record(name, dtype, benchmark, ours, others, *, moved=None, flops=None, rounds=31, leaves=()):
    def prepare():
        for leaf in leaves:
            leaf.grad = None

    result = harness.interleave(benchmark, ours, others, rounds, prepare)
    row = {"case": name, "dtype": str(dtype).removeprefix("torch."), **result}
    if moved:
        row["gb_per_s"] = moved / result["ours_ms"] / 1e6
        row["copy_gb_per_s"] = moved / result["rivals_ms"]["copy of the same bytes"] / 1e6
    if flops:
        row["gflop_per_s"] = flops / result["ours_ms"] / 1e6
    ROWS.append(row)


def with_copy(others, moved):
    return {**others, "copy of the same bytes": harness.copy_of(moved)}


def rivals_of(name, *tensors):
    """Every rival of an operator as a provider."""
    forms = {**rivals.eager(name), **rivals.compiled(name)}
    return {key: lambda f=f: f(*tensors, GRID) for key, f in forms.items()}


def backward_of(function, grad):
    """Forward and backward as one provider."""
    return lambda: function().backward(grad)


# ---- window attention


def attention_call(dtype):
    """q, k, v as slices of one packed projection, as a ViT has them."""
    qkv = randn(GRIDS.num_tokens, 3, HEADS, CHANNELS // HEADS, dtype=dtype)
    call = SPECS["window_attention"].make([GRID], dtype, heads=HEADS, head_dim=CHANNELS // HEADS)
    for position, x in enumerate(qkv.unbind(1)):
        call = call.put(position, x)
    return call.put(3, GRIDS)


def test_window_attention_forward(benchmark, dtype):
    spec, call = SPECS["window_attention"], attention_call(dtype)
    q, k, v = call.args[:3]
    expected = spec.reference(q.double(), k.double(), v.double(), GRIDS)
    others = rivals_of("window_attention", q, k, v)
    with torch.no_grad():
        for name, rival in others.items():
            check(name, rival(), expected, dtype)
        check("ours", uhd_ops.window_attention(q, k, v, GRIDS), expected, dtype)
        moved = spec.bytes_moved(call)
        record(
            "window_attention forward",
            dtype,
            benchmark,
            lambda: uhd_ops.window_attention(q, k, v, GRIDS),
            with_copy(others, moved),
            moved=moved,
        )


def test_window_attention_forward_backward(benchmark, dtype):
    leaves = [x.clone().requires_grad_() for x in attention_call(dtype).args[:3]]
    grad = randn(*leaves[0].shape, dtype=dtype)
    others = {
        name: backward_of(rival, grad)
        for name, rival in rivals_of("window_attention", *leaves).items()
    }
    # Forward moves q, k, v, out; backward q, k, v, grad_out and three gradients.
    moved = 11 * grad.numel() * grad.element_size()
    record(
        "window_attention forward + backward",
        dtype,
        benchmark,
        backward_of(lambda: uhd_ops.window_attention(*leaves, GRIDS), grad),
        with_copy(others, moved),
        moved=moved,
        leaves=leaves,
    )


# ---- one row per window


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("name", ["pixel_unshuffle", "window_mean", "window_pool"])
def test_rows_per_window(benchmark, dtype, name, backward):
    spec, op = SPECS[name], getattr(uhd_ops, name)
    count = 2 if name == "window_pool" else 1  # its logits
    leaves = [x.clone() for x in randn(count, GRIDS.num_tokens, CHANNELS, dtype=dtype)]
    expected = spec.reference(*(x.double() for x in leaves), GRIDS)
    others = rivals_of(name, *leaves)
    ours = lambda: op(*leaves, GRIDS)  # noqa: E731
    for key, rival in {**others, "ours": ours}.items():
        check(key, rival(), expected, dtype)
    inputs = sum(x.numel() for x in leaves)
    elements = (inputs + expected.numel()) * (1 + backward)
    if backward:
        elements += inputs * (name == "window_pool")  # the others need no input again
        grad = randn(*expected.shape, dtype=dtype)
        others = {key: backward_of(f, grad) for key, f in others.items()}
        ours = backward_of(ours, grad)
        leaves = [x.requires_grad_() for x in leaves]
    moved = elements * dtype.itemsize
    record(
        f"{name} {'forward + backward' if backward else 'forward'}",
        dtype,
        benchmark,
        ours,
        with_copy(others, moved),
        moved=moved,
        leaves=leaves if backward else [],
    )


# ---- MLP


def mlp_parameters(dtype, form):
    shapes = {
        "tied": ((HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN)),
        "dense": ((4 * HIDDEN, 4 * CHANNELS), (4 * HIDDEN,), (CHANNELS, 4 * HIDDEN)),
    }[form]
    weights = [randn(*shape, dtype=dtype, scale=0.02) for shape in shapes]
    bias, norm = randn(CHANNELS, dtype=dtype), randn(2, 4 * CHANNELS, dtype=dtype)
    return (*weights, bias), norm


def test_gather_norm_mean(benchmark, dtype):
    """The kernel in front of the matrix products: gather, LayerNorm over 4C, mean residual."""
    x = randn(GRIDS.num_tokens, CHANNELS, dtype=dtype)
    weight, bias = randn(2, 4 * CHANNELS, dtype=torch.float32).unbind(0)
    views = GRIDS.view_table(2, x.device)
    eager = (weight.to(dtype), bias.to(dtype))

    def ours():
        return torch.ops.uhd_ops._unshuffle_norm(
            x, views, GRIDS.num_windows(2), weight, bias, 1e-6, 2, True
        )

    expected = rivals.unshuffle_norm(x.double(), weight.double(), bias.double(), GRID)
    others = rivals_of("unshuffle_norm", x, *eager)
    with torch.no_grad():
        for key, provider in {**others, "ours": ours}.items():
            for part, wanted in zip(provider(), expected, strict=False):
                check(key, part, wanted, dtype)
        moved = int(2.25 * x.numel()) * x.element_size()
        record(
            "gather + LayerNorm + mean forward",
            dtype,
            benchmark,
            ours,
            with_copy(others, moved),
            moved=moved,
        )


def test_mlp_tied(benchmark, dtype):
    """Tied form against the same algebra in eager and compiled, and against our dense form."""
    x = randn(GRIDS.num_tokens, CHANNELS, dtype=dtype)
    parameters, norm = mlp_parameters(dtype, "tied")
    dense, _ = mlp_parameters(dtype, "dense")

    def ours(mlp=parameters):
        return uhd_ops.pixel_unshuffle_mlp(x, GRIDS, *mlp, norm_weight=norm[0], norm_bias=norm[1])

    others = {
        f"{name}, same algebra": rival
        for name, rival in rivals_of("pixel_unshuffle_mlp tied", x, *parameters, *norm).items()
    }
    with torch.no_grad():
        wide = [parameter.double() for parameter in parameters]
        expected = rivals.mlp_tied(x.double(), *wide, *norm.double(), GRID)
        for key, provider in {**others, "ours": ours}.items():
            check(key, provider(), expected, dtype)
        flops = 2 * GRIDS.num_tokens * CHANNELS * HIDDEN * 5 // 4
        record(
            "pixel_unshuffle_mlp tied forward",
            dtype,
            benchmark,
            ours,
            {**others, "our dense form": lambda: ours(dense)},
            flops=flops,
            rounds=7,
        )


def test_mlp_dense(benchmark, dtype):
    x = randn(GRIDS.num_tokens, CHANNELS, dtype=dtype)
    parameters, norm = mlp_parameters(dtype, "dense")
    with torch.no_grad():
        record(
            "pixel_unshuffle_mlp dense forward",
            dtype,
            benchmark,
            lambda: uhd_ops.pixel_unshuffle_mlp(
                x, GRIDS, *parameters, norm_weight=norm[0], norm_bias=norm[1]
            ),
            rivals_of("pixel_unshuffle_mlp dense", x, *parameters, *norm),
            flops=2 * GRIDS.num_tokens * CHANNELS * HIDDEN * 5,
            rounds=5,
        )


# ---- report


def print_rows(console: Console) -> None:
    table = Table(
        title="time of a rival / our time (median of the rounds' ratios; above 1: ours is faster)"
    )
    for column in ("case", "dtype", "ours", "ours GB/s", "rivals"):
        table.add_column(column)
    for row in ROWS:
        speed = f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else ""
        ratios = "\n".join(f"{ratio:6.2f}x {name}" for name, ratio in row["ratios"].items())
        table.add_row(row["case"], row["dtype"], f"{row['ours_ms']:.2f} ms", speed, ratios)
        table.add_section()
    console.print(table)


def main() -> int:
    options = sys.argv[1:]
    code = pytest.main(
        [__file__, "-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", *options]
    )
    import bench_ops  # pytest imported this file under its own name; its rows are there

    ROWS.extend(bench_ops.ROWS)
    print_rows(Console(width=120))
    if code == 0 and not options:
        environment = harness.environment()
        name = f"cpu_{environment['cpu_isa']}_{environment['date']}_{environment['commit']}"
        print(
            "written:", harness.write_results(name, ROWS).relative_to(harness.RESULTS.parent.parent)
        )
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
