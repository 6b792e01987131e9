# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops bench``: what it times computes the same, and it says what it timed."""

import json

import pytest
import torch
from PIL import Image

import uhd_ops
from uhd_ops.cli import main, rivals
from uhd_ops.cli._bench import DTYPES, OPS, Sizes, time_interleaved

SMALL = ["--dim", "16", "--heads", "2", "--mlp-hidden", "8", "--rounds", "2"]


def bench(capsys, *options):
    assert main(["bench", *SMALL, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_default(capsys):
    result = bench(capsys, "--views", "4x6", "--device", "cpu")
    assert (result["views"], result["window"], result["device"]) == ([[4, 6]], 2, "cpu")
    assert list(dict.fromkeys(row["op"] for row in result["results"])) == list(OPS)
    for row in result["results"]:
        assert row["milliseconds"] > 0
        assert (row["ratio"] == 1) == (row["variant"] == "uhd_ops")
        assert row["dtype"] == "float32"
    assert {row["case"] for row in result["results"] if row["op"] == "window_attention"} == {
        "window_attention float32",
        "window_attention float32, with backward",
    }


def test_options(capsys, drawn, tmp_path):
    path = tmp_path / "bench.png"
    options = ["--views", "6x3,3x9,6x6", "--window", "3", "--dtype", "float64", "float16"]
    options += ["--op", "tile_weight", "window_mean", "--device", "cpu", "--plot", str(path)]
    result = bench(capsys, *options)
    assert (result["views"], result["window"]) == ([[6, 3], [3, 9], [6, 6]], 3)
    assert list(dict.fromkeys((row["op"], row["dtype"]) for row in result["results"])) == [
        (op, dtype) for op in ("tile_weight", "window_mean") for dtype in ("float64", "float16")
    ]
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    rows = {}
    for row in result["results"]:
        rows.setdefault(row["case"], {})[row["variant"]] = row["milliseconds"] / 1e3
    panels = drawn[0].axes
    assert {
        axes.get_title(loc="left"): [b.get_width() for b in axes.patches] for axes in panels
    } == {case: list(variants.values()) for case, variants in rows.items()}
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in panels]
    assert names == [list(variants) for variants in rows.values()]
    assert main(["bench", *SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "times ours" in printed
    assert "3 views of 6x3, 3x9, 6x6 tokens, windows of 3x3, C = 16, 2 heads, I = 8" in printed
    assert printed.endswith(f"wrote {path}\n")


def sizes_of(dtype, window, grids):
    torch.manual_seed(0)
    return Sizes(uhd_ops.PackedGrids(grids), window, 16, 2, 8, DTYPES[dtype], "cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "window", "grids"),
    [
        ("float32", 2, [(4, 6)]),
        ("float64", 3, [(6, 3), (3, 9), (6, 6)]),
        ("bfloat16", 2, [(4, 6), (2, 2)]),
    ],
)
def test_rivals_compute_the_same(op, dtype, window, grids):
    # Values and scores are below 5. In float32, 64 terms of that size err by 64 * 5 * 2^-24 < 1e-4.
    # bfloat16 rivals round a score (5 * 2^-9, which the exponential makes a relative error), a
    # probability and the result (2^-9 of at most 5 each): 5 * (5 + 1 + 1) * 2^-9 < 0.07.
    tolerance = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.07}[dtype]
    for case in OPS[op](sizes_of(dtype, window, grids)):
        results = {name: function() for name, function in case.variants.items()}
        ours = results.pop("uhd_ops")
        assert len(results) >= 2
        for name, result in results.items():
            pairs = zip(result, ours, strict=True) if isinstance(ours, tuple) else [(result, ours)]
            for x, y in pairs:
                assert torch.allclose(x.view_as(y), y, rtol=0, atol=tolerance), name


def test_windows_of_several_views():
    """Rows of ``split`` are the windows of the first view, then those of the next; back by join."""
    grids, x = [(4, 2), (2, 4)], torch.arange(16)
    windows = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert rivals.split(x, grids).tolist() == windows
    assert rivals.join(rivals.split(x, grids), grids).tolist() == x.tolist()
    assert rivals.split(x[:8], grids[:1]).tolist() == windows[:2]


def test_time_is_the_median_of_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = time_interleaved(variants, 3, "cpu")
    assert "".join(order) == "aabb" + "ab" * 3
    assert medians.keys() == {"a", "b"}
    assert min(medians.values()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dim", "10", "--heads", "3"], "--dim must be a multiple of --heads, got 10 and 3"),
        (
            ["--views", "4x6,3x4"],
            "multiples of --window, 2, because the plain PyTorch versions take whole",
        ),
        (["--window", "1"], "--window must be at least 2, got 1"),
        (["--views", "4x4", "--op", "window_mean", "--plot", "{folder}/no/x.png"], "cannot write"),
    ],
)
def test_refuses(options, message, tmp_path, capsys):
    options = [option.format(folder=tmp_path) for option in options]
    assert main(["bench", *SMALL, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("uhd-ops bench: error: ")
    assert message in line


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *SMALL, "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "99999"], "argument --threads: must be at most 1024"),
        (["--views", "big"], "argument --views: must look like 32x32,28x36, got 'big'"),
        (["--views", "4x4,"], "argument --views: must look like 32x32,28x36, got '4x4,'"),
        (["--views", "4x0"], "argument --views: must have sides of at least 1, got '4x0'"),
        (["--op", "mean"], "argument --op: invalid choice: 'mean' (choose from"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' (choose from"),
    ],
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
