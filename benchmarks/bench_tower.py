# SPDX-License-Identifier: Apache-2.0
"""The whole vision tower of MiniCPM-V 4.6 on the CPU: transformers' own against accelerate().

    python benchmarks/bench_tower.py             all cases; prints times and ratios, writes results/
    python benchmarks/bench_tower.py -k merger   some cases; writes nothing

The tower has the sizes of SigLIP2-so400m at 980 px, which LLaVA-UHD v4 and MiniCPM-V build on: 27
layers, C = 1152, 16 heads, hidden size 4304, patch 14, the compressor after layer 6; its weights
are random. Images are of 448 x 448 pixels, 32 x 32 patches; ten of them are a picture cut into nine
slices, with its overview. "merger" is the compressor alone, whose original makes one call of
scaled_dot_product_attention for each window; the tower spends most of its time elsewhere.
"""

from __future__ import annotations

import copy
import sys

import harness
import pytest
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import MiniCPMV4_6VisionConfig
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel

from uhd_ops.integrations.transformers import accelerate

PATCH, GRID, LAYERS, MERGED_AFTER = 14, (32, 32), 27, 6
SIZES = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": PATCH,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative error, in the Euclidean norm, up to which two results count as the same network.
SAME = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
# part, views, dtype, rounds
CASES = [
    ("merger", 1, "float32", 15),
    ("merger", 10, "float32", 3),
    ("merger", 1, "bfloat16", 31),
    ("merger", 10, "bfloat16", 9),
    ("tower", 1, "float32", 5),
    ("tower", 1, "bfloat16", 9),
    ("tower", 10, "bfloat16", 3),
]

ROWS: list[dict] = []


def make_tower(layers: int, insert_layer_id: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return a tower with random weights."""
    config = MiniCPMV4_6VisionConfig(
        **SIZES, num_hidden_layers=layers, insert_layer_id=insert_layer_id
    )
    assert config._attn_implementation in (None, "sdpa")
    with torch.device("meta"):
        tower = MiniCPMV4_6VisionModel(config)
    tower = tower.to_empty(device="cpu").to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(float(norm), 0.02, generator=generator)
    return tower


def accelerated_copy(tower: torch.nn.Module) -> torch.nn.Module:
    """Return an accelerated tower with the same parameters, not copies of them."""
    shared = {id(parameter): parameter for parameter in tower.parameters()}
    return accelerate(copy.deepcopy(tower, shared))


def providers(part: str, views: int, dtype: torch.dtype):
    """Return what is run, with ours first, and the number of views as an input."""
    sizes = torch.tensor([GRID] * views)
    tokens = views * GRID[0] * GRID[1]
    generator = torch.Generator().manual_seed(1)
    if part == "merger":
        tower = make_tower(1, 0, dtype)
        x = torch.randn(1, tokens, SIZES["hidden_size"], generator=generator).to(dtype)
        return [lambda t=t: t.vit_merger(x, sizes) for t in (accelerated_copy(tower), tower)]
    tower = make_tower(LAYERS, MERGED_AFTER, dtype)
    x = torch.randn(1, 3, PATCH, PATCH * tokens, generator=generator).to(dtype)
    return [
        lambda t=t: t(x, target_sizes=sizes).last_hidden_state
        for t in (accelerated_copy(tower), tower)
    ]


@pytest.mark.parametrize(
    ("part", "views", "dtype", "rounds"),
    CASES,
    ids=[f"{part}-{views}-{dtype}" for part, views, dtype, _ in CASES],
)
@torch.no_grad()
def test_tower(benchmark, part, views, dtype, rounds):
    ours, original = providers(part, views, DTYPES[dtype])
    expected = original().double()
    error = (ours().double() - expected).norm() / expected.norm()
    assert error < SAME[DTYPES[dtype]], f"relative difference {error:.2e}"
    result = harness.interleave(benchmark, ours, {"transformers, sdpa": original}, rounds)
    ROWS.append({"case": part, "views": views, "dtype": dtype, "rounds": rounds, **result})


def print_rows(console: Console) -> None:
    table = Table(
        title="median times; ratio: median of the rounds' ratios, above 1: ours is faster"
    )
    for column in ("case", "views", "dtype", "original", "ours", "ratio"):
        table.add_column(column)
    for row in ROWS:
        name, original = next(iter(row["rivals_ms"].items()))
        table.add_row(
            row["case"],
            str(row["views"]),
            row["dtype"],
            f"{original:.1f} ms",
            f"{row['ours_ms']:.1f} ms",
            f"{row['ratios'][name]:.2f}x",
        )
    console.print(table)


def main() -> int:
    options = sys.argv[1:]
    # transformers, imported above, imports what has a plugin for pytest, too early to be rewritten.
    early = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
    code = pytest.main(
        [__file__, "-q", "-p", "no:cacheprovider", "--benchmark-disable-gc", *early, *options]
    )
    import bench_tower  # pytest imported this file under its own name; its rows are there

    ROWS.extend(bench_tower.ROWS)
    print_rows(Console(width=120))
    if code == 0 and not options:
        for row in ROWS:
            row["transformers"] = transformers.__version__
        environment = harness.environment()
        name = f"tower_{environment['cpu_isa']}_{environment['date']}_{environment['commit']}"
        print("written:", harness.write_results(name, ROWS).name)
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
