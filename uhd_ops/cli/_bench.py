# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops bench``: the operators against what one would write in plain PyTorch."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import uhd_ops
from uhd_ops.cli import rivals
from uhd_ops.cli._support import UserError, positive_int, require, threads

Grid = tuple[int, int]
SUMMARY = "time the operators against plain PyTorch"


class Case(NamedTuple):
    """Functions that compute the same thing; ours is called ``uhd_ops``."""

    name: str
    variants: dict[str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "--grid",
        type=_even_grid,
        default=(32, 32),
        metavar="HxW",
        help="patch grid of the view, sides even (default: 32x32, for 448x448 px)",
    )
    add("--dim", type=positive_int, default=1152, help="width of a token (default: %(default)s)")
    add("--heads", type=positive_int, default=16, help="attention heads (default: %(default)s)")
    add(
        "--mlp-hidden",
        type=positive_int,
        default=4304,
        metavar="I",
        help="hidden width of the host's MLP (default: %(default)s)",
    )
    add("--rounds", type=positive_int, default=10, help="timed calls each (default: %(default)s)")
    add("--threads", type=threads, help="CPU threads (default: as many as PyTorch chooses)")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Time every case and print medians and ratios.

    Raises:
        UserError: A package is missing.
    """
    if not arguments.json:
        require("rich")
    if arguments.dim % arguments.heads:
        raise UserError(
            f"--dim must be a multiple of --heads, got {arguments.dim} and {arguments.heads}"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for make in CASES:
        torch.manual_seed(0)
        case = make(arguments.grid, arguments.dim, arguments.heads, arguments.mlp_hidden)
        rows += _rows(case, time_interleaved(case.variants, arguments.rounds))
    result = {
        "grid": list(arguments.grid),
        "dim": arguments.dim,
        "heads": arguments.heads,
        "mlp_hidden": arguments.mlp_hidden,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "cpu_isa": uhd_ops.build_info().cpu_isa,
        "versions": uhd_ops.build_info().versions,
        "results": rows,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)


def time_interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time functions in turn, so that a slow moment of the machine falls on all of them.

    Args:
        variants: Functions by name; each runs twice before the clock starts.
        rounds: Timed calls of each.

    Returns:
        Median seconds of each.
    """
    for function in variants.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _rows(case: Case, medians: dict[str, float]) -> list[dict[str, object]]:
    ours = medians["uhd_ops"]
    return [
        {"case": case.name, "variant": name, "milliseconds": 1e3 * median, "ratio": median / ours}
        for name, median in medians.items()
    ]


def _show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    height, width = result["grid"]
    table = Table("operator", "variant", "median ms", "times ours")
    for column in table.columns[2:]:
        column.justify = "right"
    previous = None
    for row in result["results"]:
        if previous not in (None, row["case"]):
            table.add_section()
        name = "" if row["case"] == previous else row["case"]
        table.add_row(name, row["variant"], f"{row['milliseconds']:.2f}", f"{row['ratio']:.2f}")
        previous = row["case"]
    console = Console()
    console.print(
        f"grid {height}x{width}, C = {result['dim']}, {result['heads']} heads, "
        f"{result['threads']} threads, "
        f"CPU kernels: {result['cpu_isa'] or 'none, reference only'}",
        highlight=False,
    )
    console.print(table)


def _even_grid(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        grid = int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 32x32, got {text!r}") from None
    if min(grid) < 2 or grid[0] % 2 or grid[1] % 2:
        raise argparse.ArgumentTypeError(
            "must have even sides of at least 2, because the rivals know no ragged windows; "
            f"got {text!r}"
        )
    return grid


# ---- cases: our operator and its rivals on the same tensors --------------------------------------


def _attention(dtype: torch.dtype, backward: bool) -> Callable[..., Case]:
    def make(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
        tokens = grid[0] * grid[1]
        qkv = torch.randn(tokens, 3, heads, dim // heads, dtype=dtype, requires_grad=backward)
        grad = torch.randn(tokens, heads, dim // heads, dtype=dtype)

        def call(function: Callable[..., torch.Tensor], grids: object) -> Callable[[], object]:
            if not backward:
                return lambda: function(qkv, grids)
            return lambda: torch.autograd.grad(function(qkv, grids), qkv, grad)[0]

        direction = ", with backward" if backward else ""
        variants = {
            "uhd_ops": call(uhd_ops.window_attention_qkvpacked, [grid]),
            **{name: call(f, grid) for name, f in rivals.eager("window_attention").items()},
            "reference": call(uhd_ops.reference.window_attention_qkvpacked, [grid]),
        }
        return Case(f"window_attention {str(dtype)[6:]}{direction}", variants)

    return make


def _row_per_window(op: str) -> Callable[..., Case]:
    def make(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
        x = torch.randn(grid[0] * grid[1], dim)
        variants = {
            "uhd_ops": lambda: getattr(uhd_ops, op)(x, [grid]),
            **{name: lambda f=f: f(x, grid) for name, f in rivals.eager(op).items()},
            "reference": lambda: getattr(uhd_ops.reference, op)(x, [grid]),
        }
        return Case(f"{op} float32", variants)

    return make


def _mlp(grid: Grid, dim: int, heads: int, mlp_hidden: int) -> Case:
    x = torch.randn(grid[0] * grid[1], dim)
    norm = torch.ones(4 * dim), torch.zeros(4 * dim)
    tied = torch.randn(mlp_hidden, dim) * 0.02, torch.zeros(mlp_hidden)
    tied += torch.randn(dim, mlp_hidden) * 0.02, torch.zeros(dim)
    dense = (
        uhd_ops.tile_block_diagonal(tied[0], 4),
        uhd_ops.tile_vector(tied[1], 4),
        uhd_ops.tile_average(tied[2], 4),
        tied[3],
    )

    def ours(weights: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: uhd_ops.pixel_unshuffle_mlp(
            x, [grid], *weights, norm_weight=norm[0], norm_bias=norm[1]
        )

    variants = {"uhd_ops": ours(dense), "uhd_ops, tied form": ours(tied)}
    for form, weights in {"dense": dense, "tied": tied}.items():
        for name, rival in rivals.eager(f"pixel_unshuffle_mlp {form}").items():
            variants[f"{name}, {form} form"] = lambda f=rival, w=weights: f(x, *w, *norm, grid)
    return Case("pixel_unshuffle_mlp float32", variants)


CASES = (
    _attention(torch.float32, backward=False),
    _attention(torch.bfloat16, backward=False),
    _attention(torch.float32, backward=True),
    _row_per_window("pixel_unshuffle"),
    _row_per_window("window_mean"),
    _mlp,
)
"""Functions ``make(grid, dim, heads, mlp_hidden)``, which return a case on random tensors."""
