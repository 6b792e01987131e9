# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops bench``: the operators against what one would write in plain PyTorch."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import uhd_ops
from uhd_ops import plot
from uhd_ops.cli import rivals
from uhd_ops.cli._models import find_device
from uhd_ops.cli._support import (
    UserError,
    new_table,
    report,
    require,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grid = tuple[int, int]
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class Sizes(NamedTuple):
    """What the operators run on."""

    grids: uhd_ops.PackedGrids
    window: int
    dim: int
    heads: int
    mlp_hidden: int
    dtype: torch.dtype
    device: str

    @property
    def tokens(self) -> int:
        """Tokens of all views."""
        return self.grids.num_tokens

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return random numbers of the dtype, on the device."""
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)


class Case(NamedTuple):
    """Functions that compute the same thing; ours is called ``uhd_ops``."""

    name: str
    variants: dict[str, Callable[[], object]]
    detail: str = ""


def run(arguments: argparse.Namespace) -> None:
    """Time every case and print medians and ratios.

    Raises:
        UserError: A package or the device is missing, sizes do not go together, or the plot cannot
            be written.
    """
    require(*([] if arguments.json else ["rich"]), *(["matplotlib"] if arguments.plot else []))
    if arguments.dim % arguments.heads:
        raise UserError(
            f"--dim must be a multiple of --heads, got {arguments.dim} and {arguments.heads}"
        )
    if arguments.window < 2:
        raise UserError(f"--window must be at least 2, got {arguments.window}")
    for height, width in arguments.views:
        if height % arguments.window or width % arguments.window:
            raise UserError(
                f"--views must have sides that are multiples of --window, {arguments.window}, "
                f"because the plain PyTorch versions take whole windows only; got {height}x{width}"
            )
    device = find_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(arguments.op):
        for dtype in dict.fromkeys(arguments.dtype):
            sizes = Sizes(
                uhd_ops.PackedGrids(arguments.views),
                arguments.window,
                arguments.dim,
                arguments.heads,
                arguments.mlp_hidden,
                DTYPES[dtype],
                device,
            )
            torch.manual_seed(0)
            for case in OPS[name](sizes):
                medians = time_interleaved(case.variants, arguments.rounds, device)
                rows += _rows(name, dtype, case, medians)
    info = uhd_ops.build_info()
    result = {
        "views": [list(grid) for grid in arguments.views],
        "window": arguments.window,
        "dim": arguments.dim,
        "heads": arguments.heads,
        "mlp_hidden": arguments.mlp_hidden,
        "rounds": arguments.rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_isa": info.cpu_isa,
        "versions": info.versions,
        "results": rows,
    }
    report(arguments, result, _show, _draw)


def time_interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, float]:
    """Time functions in turn, so that a slow moment of the machine falls on all of them.

    Args:
        variants: Functions by name; each runs twice before the clock starts.
        rounds: Timed calls of each.
        device: Where they run; the clock stops when a GPU has done its work.

    Returns:
        Median seconds of each.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for function in variants.values():
        function()
        function()
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _rows(op: str, dtype: str, case: Case, medians: dict[str, float]) -> list[dict[str, Any]]:
    ours = medians["uhd_ops"]
    return [
        {
            "op": op,
            "dtype": dtype,
            "case": f"{case.name} {dtype}{case.detail}",
            "variant": name,
            "milliseconds": 1e3 * median,
            "ratio": median / ours,
        }
        for name, median in medians.items()
    ]


def _setting(result: dict[str, Any]) -> str:
    views = [f"{height}x{width}" for height, width in result["views"]]
    some = ", ".join(views[:4]) + (", ..." if len(views) > 4 else "")
    return (
        f"{len(views)} view{'s' * (len(views) > 1)} of {some} tokens, "
        f"windows of {result['window']}x{result['window']}, C = {result['dim']}, "
        f"{result['heads']} heads, I = {result['mlp_hidden']}"
    )


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    table = new_table("operator", "variant", numbers=("median ms", "times ours"), title="")
    previous = None
    for row in result["results"]:
        if previous not in (None, row["case"]):
            table.add_section()
        name = "" if row["case"] == previous else row["case"]
        table.add_row(name, row["variant"], f"{row['milliseconds']:.3f}", f"{row['ratio']:.2f}")
        previous = row["case"]
    console = Console()
    console.print(_setting(result), highlight=False)
    where = result["device"]
    if where == "cpu":
        kernels = result["cpu_isa"] or "none, reference only"
        where = f"CPU, {result['threads']} threads, kernels: {kernels}"
    console.print(where, highlight=False)
    console.print(table)


def _draw(result: dict[str, Any], figure: Figure) -> None:
    """Draw the medians of every case."""
    cases: dict[str, dict[str, float]] = {}
    for row in result["results"]:
        cases.setdefault(row["case"], {})[row["variant"]] = row["milliseconds"] / 1e3
    plot.timings(cases, figure=figure).suptitle(_setting(result), fontsize=10)


# ---- cases: our operator and its rivals on the same tensors --------------------------------------


def _attention(sizes: Sizes) -> Iterator[Case]:
    head_dim = sizes.dim // sizes.heads
    qkv = sizes.randn(sizes.tokens, 3, sizes.heads, head_dim)
    leaf, grad = qkv.detach().requires_grad_(), sizes.randn(sizes.tokens, sizes.heads, head_dim)

    def forward(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: function(qkv, sizes.grids, sizes.window)

    def backward(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(leaf, sizes.grids, sizes.window), leaf, grad)[0]

    functions = {
        "uhd_ops": uhd_ops.window_attention_qkvpacked,
        **rivals.eager("window_attention"),
        "reference": uhd_ops.reference.window_attention_qkvpacked,
    }
    for detail, call in (("", forward), (", with backward", backward)):
        variants = {name: call(function) for name, function in functions.items()}
        yield Case("window_attention", variants, detail)


def _row_per_window(op: str, inputs: int = 1) -> Callable[[Sizes], Iterator[Case]]:
    def make(sizes: Sizes) -> Iterator[Case]:
        x = [sizes.randn(sizes.tokens, sizes.dim) for _ in range(inputs)]
        functions = {
            "uhd_ops": getattr(uhd_ops, op),
            **rivals.eager(op),
            "reference": getattr(uhd_ops.reference, op),
        }
        yield Case(
            op,
            {name: lambda f=f: f(*x, sizes.grids, sizes.window) for name, f in functions.items()},
        )

    return make


def _mlp(sizes: Sizes) -> Iterator[Case]:
    dim, hidden, cells = sizes.dim, sizes.mlp_hidden, sizes.window**2
    x = sizes.randn(sizes.tokens, dim)
    norm = torch.ones_like(x[0]).repeat(cells), torch.zeros_like(x[0]).repeat(cells)
    tied = sizes.randn(hidden, dim, scale=0.02), torch.zeros_like(x[0, :1]).repeat(hidden)
    tied += sizes.randn(dim, hidden, scale=0.02), torch.zeros_like(x[0])
    dense = (
        uhd_ops.tile_block_diagonal(tied[0], cells),
        uhd_ops.tile_vector(tied[1], cells),
        uhd_ops.tile_average(tied[2], cells),
        tied[3],
    )

    def ours(weights: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        return lambda: uhd_ops.pixel_unshuffle_mlp(
            x, sizes.grids, *weights, norm_weight=norm[0], norm_bias=norm[1], factor=sizes.window
        )

    variants = {"uhd_ops": ours(dense), "uhd_ops, tied form": ours(tied)}
    for form, weights in {"dense": dense, "tied": tied}.items():
        for name, rival in rivals.eager(f"pixel_unshuffle_mlp {form}").items():
            variants[f"{name}, {form} form"] = lambda f=rival, w=weights: f(
                x, *w, *norm, sizes.grids, sizes.window
            )
    yield Case("pixel_unshuffle_mlp", variants)


def _tile_weight(sizes: Sizes) -> Iterator[Case]:
    cells = sizes.window**2
    fc1 = sizes.randn(sizes.mlp_hidden, sizes.dim)
    fc2 = sizes.randn(sizes.dim, sizes.mlp_hidden)

    def tiles(module: Any) -> Callable[[], object]:
        return lambda: (module.tile_block_diagonal(fc1, cells), module.tile_average(fc2, cells))

    variants = {
        "uhd_ops": tiles(uhd_ops),
        **{
            name: lambda f=f: f(fc1, fc2, sizes.grids, sizes.window)
            for name, f in rivals.eager("tile_weight").items()
        },
        "reference": tiles(uhd_ops.reference),
    }
    yield Case("tile_weight", variants)


OPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "window_attention": _attention,
    "pixel_unshuffle": _row_per_window("pixel_unshuffle"),
    "window_mean": _row_per_window("window_mean"),
    "window_pool": _row_per_window("window_pool", inputs=2),
    "pixel_unshuffle_mlp": _mlp,
    "tile_weight": _tile_weight,
}
"""Functions of sizes, which make cases on random tensors."""
