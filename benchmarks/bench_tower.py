# SPDX-License-Identifier: Apache-2.0
"""The whole vision tower of MiniCPM-V 4.6: transformers' own against accelerate().

    python benchmarks/bench_tower.py             all cases; prints times and ratios, writes results/
    python benchmarks/bench_tower.py -k merger   some cases; writes nothing
    python benchmarks/bench_tower.py --device cuda   on a GPU; writes nothing either, as
                                                     bench_gpu.py has the times that are kept

The tower has the sizes of SigLIP2-so400m at 980 px, which LLaVA-UHD v4 and MiniCPM-V build on: 27
layers, C = 1152, 16 heads, hidden size 4304, patch 14, the compressor after layer 6; its weights
are random. Images are of 448 x 448 pixels, 32 x 32 patches; ten of them are a picture cut into nine
slices, with its overview. "merger" is the compressor alone, whose original makes one call of
scaled_dot_product_attention for each window; the tower spends most of its time elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import harness
import pytest
import torch
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

COLUMNS = {
    "case": lambda row: row["case"],
    "views": lambda row: str(row["views"]),
    "dtype": lambda row: row["dtype"],
    "original": lambda row: f"{row['rivals_ms']['transformers, sdpa']:.1f} ms",
    "ours": lambda row: f"{row['ours_ms']:.1f} ms",
    "ratio": lambda row: f"{row['ratios']['transformers, sdpa']:.2f}x",
}

# The variable that tells pytest's copy of this file where to run.
DEVICE = "UHD_OPS_BENCH_DEVICE"
ROWS: list[dict] = []


def make_tower(layers, insert_layer_id, dtype, device, sizes) -> torch.nn.Module:
    """Return a tower with random weights."""
    config = MiniCPMV4_6VisionConfig(
        **{**SIZES, **sizes}, num_hidden_layers=layers, insert_layer_id=insert_layer_id
    )
    assert config._attn_implementation in (None, "sdpa")
    with torch.device("meta"):
        tower = MiniCPMV4_6VisionModel(config)
    tower = tower.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(float(norm), 0.02, generator=generator)
    return tower


def accelerated_copy(tower: torch.nn.Module) -> torch.nn.Module:
    """Return an accelerated tower with the same parameters, not copies of them."""
    shared = {id(parameter): parameter for parameter in tower.parameters()}
    return accelerate(copy.deepcopy(tower, shared))


def providers(part, views, dtype, device="cpu", grid=GRID, sizes=SIZES):
    """Return what is run, ours first: "merger" or "tower" on so many views of one grid."""
    target_sizes = torch.tensor([grid] * views, device=device)
    tokens = views * grid[0] * grid[1]

    def randn(*shape):
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if part == "merger":
        tower = make_tower(1, 0, dtype, device, sizes)
        x = randn(1, tokens, sizes["hidden_size"])
        return [lambda t=t: t.vit_merger(x, target_sizes) for t in (accelerated_copy(tower), tower)]
    tower = make_tower(LAYERS, MERGED_AFTER, dtype, device, sizes)
    x = randn(1, 3, PATCH, PATCH * tokens)
    return [
        lambda t=t: t(x, target_sizes=target_sizes).last_hidden_state
        for t in (accelerated_copy(tower), tower)
    ]


def until_done(provider):
    """Return what also waits for the device."""
    return lambda: (provider(), torch.cuda.synchronize())


@pytest.mark.parametrize(
    ("part", "views", "dtype", "rounds"),
    CASES,
    ids=[f"{part}-{views}-{dtype}" for part, views, dtype, _ in CASES],
)
@torch.no_grad()
def test_tower(benchmark, part, views, dtype, rounds):
    device = os.environ.get(DEVICE, "cpu")
    ours, original = providers(part, views, DTYPES[dtype], device)
    expected = original().double()
    error = (ours().double() - expected).norm() / expected.norm()
    assert error < SAME[DTYPES[dtype]], f"relative difference {error:.2e}"
    if device == "cuda":
        ours, original = map(until_done, (ours, original))
    result = harness.interleave(benchmark, ours, {"transformers, sdpa": original}, rounds)
    ROWS.append({"case": part, "views": views, "dtype": dtype, "rounds": rounds, **result})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options, sys.argv[1:] = parser.parse_known_args()
    os.environ[DEVICE] = options.device
    raise SystemExit(harness.main(__file__, "tower", COLUMNS, keep=options.device == "cpu"))
