# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops flops``: the numbers that it prints are the library's."""

import json

import pytest
import timm
from PIL import Image

from uhd_ops import flops, insert_early_compressor, insert_progressive_compression
from uhd_ops.cli import main

MODEL = "test_vit"  # timm's smallest: 6 blocks of width 64, patch 16, 160 px


def result_of(capsys, *options):
    assert main(["flops", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_paper(capsys):
    assert main(["flops", "--paper"]) == 0
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if line]
    rows = [row for row in cells if len(row) == 5]
    assert len(rows) == len(flops.PAPER_ROWS) == 12
    for row, expected in zip(rows, flops.PAPER_ROWS, strict=True):
        assert row[:2] == [expected.table, expected.name]
        published, computed, difference = map(float, row[2:])
        assert published == expected.published
        assert abs(computed - expected.computed) <= 0.0005
        assert abs(difference) < 0.1
    corrected = [row for row in cells if len(row) == 4]
    assert ["as published", "3555.07", "1573.10", "55.8%"] in corrected
    assert ["true windows, tied form", "489.17", "220.29", "55.0%"] in corrected
    assert ["plain MACs", "3511.18", "1502.45", "57.2%"] in corrected
    assert len(corrected) == 14


def test_paper_json(capsys):
    result = result_of(capsys, "--paper")
    assert [row["computed"] for row in result["rows"]] == [row.computed for row in flops.PAPER_ROWS]
    assert [part["grid"] for part in result["corrected"]] == [[70, 70], [32, 32]]
    for part in result["corrected"]:
        for row, variant in zip(part["variants"], flops.paper_totals(part["grid"]), strict=True):
            values = (variant.name, variant.giga, variant.without, variant.saved)
            assert tuple(row[key] for key in ("name", "with", "without", "saved")) == values


def test_paper_v3(capsys):
    result = result_of(capsys, "--paper", "v3")
    for row, expected in zip(result["rows"], flops.v3_rows(1024), strict=True):
        assert (row["patch"], row["merges"], row["grid"]) == (
            expected.patch,
            expected.merges,
            list(expected.grid),
        )
        assert (row["released"], row["uhd_ops"]) == (expected.released, expected.computed)
        assert row["of_moonvit"] == expected.released / flops.v3_rows(1024)[0].released
    assert [(row["side"], row["published"], row["computed"]) for row in result["tokens"]] == [
        (512, 163, 144),
        (768, 368, 361),
        (1024, 655, 625),
    ]
    assert [row["difference"] for row in result["tokens"]] == [-19, -7, -30]
    assert main(["flops", "--paper", "v3"]) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    assert ["16 to 10", "4-18", "10000", "625", "2412.0", "2399.6", "63.4%"] in lines
    assert len([line for line in lines if len(line) == 7]) == 17 + 1  # "MoonViT" is folded
    assert "No number of operations is published" in " ".join(printed.split())


def test_paper_alone_is_v4(capsys):
    assert result_of(capsys, "--paper") == result_of(capsys, "--paper", "v4")


@pytest.mark.parametrize(
    "options",
    [
        ["--layer", "2"],
        ["--layer", "2", "--grid", "7x5", "--form", "tied", "--window", "3"],
        ["--layer", "1", "--image", "64x32", "--attention", "none", "--mlp", "plain"],
        ["--layer", "5", "--attention", "cross_mean", "--mlp", "none"],
    ],
)
def test_model(options, capsys):
    result = result_of(capsys, MODEL, *options)
    grid = (7, 5) if "--grid" in options else (2, 4) if "--image" in options else (10, 10)
    assert result["grid"] == list(grid)
    vit = timm.create_model(MODEL)
    assert result["without"] == flops.of_vit(vit, [grid]).to_dict()
    inserted = {"layer": int(options[1])}
    inserted |= {"form": "tied", "window": 3} if "tied" in options else {}
    inserted |= {"attention": "none", "mlp": "plain"} if "plain" in options else {}
    inserted |= {"attention": "cross_mean", "mlp": "none"} if "cross_mean" in options else {}
    expected = flops.of_vit(insert_early_compressor(vit, **inserted), [grid])
    assert result["with"] == expected.to_dict()


def test_progressive(capsys):
    result = result_of(capsys, MODEL, "--progressive", "1,3", "--pool", "unshuffle")
    vit = insert_progressive_compression(timm.create_model(MODEL), (1, 3), pool="unshuffle")
    assert result["with"] == flops.of_vit(vit, [(10, 10)]).to_dict()
    assert main(["flops", MODEL, "--progressive", "1,3"]) == 0
    printed = capsys.readouterr().out
    assert "progressive 1, 3, pool adaptive, window 2\n" in printed
    assert "compressors.1" in printed


def test_model_table(capsys):
    assert main(["flops", MODEL, "--layer", "2"]) == 0
    printed = capsys.readouterr().out
    report = flops.of_vit(insert_early_compressor(timm.create_model(MODEL), 2), [(10, 10)])
    lines = [line for line in printed.splitlines() if "blocks." in line or "compressor " in line]
    assert len(lines) == 6 + 1
    assert "layer 2, attention window, mlp reuse, form dense, window 2\n" in printed
    assert "1e6 multiply-accumulates" in printed  # in 1e9, layers would be 0.002
    totals = [line.split("│")[-3:-1] for line in printed.splitlines() if "total  " in line]
    without = flops.of_vit(timm.create_model(MODEL), [(10, 10)])
    assert [[float(cell) for cell in row] for row in totals] == [
        [round(report.total / 1e6, 3), round(without.total / 1e6, 3)]
    ]
    assert printed.endswith(f"{1 - report.total / without.total:.1%} saved\n")
    assert "10x10 patches of 16x16 px" in printed


def test_other_families(capsys):
    """One that must be made for the size, one that takes any."""
    result = result_of(capsys, "beit_base_patch16_224", "--grid", "4x6", "--layer", "1")
    tokens = {row["name"]: row["tokens"] for row in result["with"]["layers"]}
    assert (tokens["patch_embed"], tokens["compressor"]) == (24, 24)
    assert (tokens["blocks.1"], tokens["blocks.2"]) == (25, 7)
    result = result_of(capsys, "vit_small_patch16_dinov3", "--grid", "4x6", "--layer", "1")
    tokens = {row["name"]: row["tokens"] for row in result["with"]["layers"]}
    assert (tokens["blocks.1"], tokens["blocks.2"]) == (29, 11)


@pytest.mark.parametrize("options", [["--paper"], ["--paper", "v3"], [MODEL, "--layer", "2"]])
def test_plot(options, drawn, tmp_path, capsys):
    path = tmp_path / "flops.png"
    assert main(["flops", *options, "--plot", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    with Image.open(path) as picture:
        assert min(picture.size) > 400
    (figure,) = drawn
    if options == ["--paper"]:
        left, differences, savings = figure.axes
        assert len(left.get_yticklabels()) == len(flops.PAPER_ROWS)
        found = differences.collections[1].get_offsets()[:, 0]
        assert found.tolist() == pytest.approx([row.difference for row in flops.PAPER_ROWS])
        assert [len(bars) for bars in savings.containers] == [7, 7]
        assert savings.texts[0].get_text() == "55.8 %"
    elif options[0] == "--paper":
        rows = flops.v3_rows(1024)
        costs, tokens = figure.axes
        assert [bar.get_width() for bar in costs.patches] == [row.released for row in rows]
        assert [bar.get_width() for bar in tokens.patches] == [row.merged_tokens for row in rows]
    else:
        (axes,) = figure.axes
        assert len(axes.containers[0]) == 1 + 6 + 1
        assert "MMACs to" in axes.get_title()
        assert figure._suptitle.get_text() == f"{MODEL}, 10x10 patches"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one model, or pass --paper"),
        ([MODEL, "--paper"], "name one model, or pass --paper"),
        ([MODEL, "--paper", "v3"], "name one model, or pass --paper"),
        (["--paper", "v3", "--window", "3"], "--window goes with a model, not with --paper"),
        (["--paper", "--form", "tied"], "--form goes with a model, not with --paper"),
        ([MODEL, "--pool", "mean"], "--pool goes with --progressive"),
        (
            [MODEL, "--progressive", "1,2", "--form", "tied"],
            "--form goes with the early compressor, not with --progressive",
        ),
        ([MODEL, "--progressive", "3,2"], "layers must ascend, with at least one, got (3, 2)"),
        ([MODEL, "--progressive", "3,9"], "layers must be in 0..5 for a model of 6 blocks"),
        (["vit_tinny"], "timm has no model 'vit_tinny'; it has"),
        (["resnet18"], "model resnet18: vit must tell the side of its patches, got ResNet"),
        ([MODEL, "--layer", "6"], "layer must be in 0..5 for a model of 6 blocks, got 6"),
        ([MODEL, "--image", "100x64"], "an image of 100x64 px is not a whole number of patches"),
        ([MODEL, "--window", "1"], "window must be at least 2, got 1"),
        (["--paper", "--plot", "{folder}/no/x.png"], "cannot write the plot: "),
        (["--paper", "--plot", "{folder}/x.nothing"], "Format 'nothing' is not supported"),
    ],
)
def test_refuses(options, message, tmp_path, capsys):
    assert main(["flops", *(option.format(folder=tmp_path) for option in options)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("uhd-ops flops: error: ")
    assert message in line
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([MODEL, "--grid", "4"], "argument --grid: must look like 32x32, got '4'"),
        ([MODEL, "--grid", "0x4"], "argument --grid: must have sides of at least 1, got '0x4'"),
        ([MODEL, "--grid", "4x4", "--image", "4x4"], "not allowed with argument --grid"),
        ([MODEL, "--progressive", "4,"], "argument --progressive: must be an integer, got ''"),
        (["--paper", "v5"], "argument --paper: invalid choice: 'v5' (choose from"),
        ([MODEL, "--layer", "-1"], "argument --layer: must be at least 0, got -1"),
    ],
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["flops", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages(monkeypatch, capsys):
    find = "uhd_ops.cli._support.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    assert main(["flops", "--paper", "--plot", "x.png"]) == 2
    expected = "missing packages: rich, matplotlib; install them with: pip install 'uhd_ops[cli]'"
    assert expected in capsys.readouterr().err
    assert main(["flops", MODEL, "--json"]) == 2
    assert "missing packages: timm;" in capsys.readouterr().err
