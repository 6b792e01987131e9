# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and how it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import uhd_ops
from uhd_ops.cli import _report, main

MODEL = "test_vit"  # timm's smallest: 6 blocks of width 64, patch 16, one class token


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def encode(photo, *options):
    out = photo.parent / "out"
    command = ["encode", str(photo), "--model", MODEL, "--layer", "2", "--out", str(out)]
    return main([*command, *options]), out / "photo"


def test_encode_writes_and_prints(photo, capsys):
    code, folder = encode(photo)
    assert code == 0
    printed = capsys.readouterr().out
    assert "RANDOM weights" in printed
    backend = uhd_ops.build_info().backends["window_attention"]["cpu"]
    for word in (
        "photo.png",
        backend,
        "MACs",
        "time",
        "tokens.safetensors",
        "random (seed 0)",
    ):
        assert word in printed
    assert {f.name for f in folder.iterdir()} == {
        "tokens.safetensors",
        "slices.png",
        "summary.json",
    }
    with Image.open(folder / "slices.png") as picture:
        assert min(picture.size) > 500
    summary = json.loads((folder / "summary.json").read_text())
    with safe_open(folder / "tokens.safetensors", "pt") as file:
        tokens, grids, metadata = (
            file.get_tensor("tokens"),
            file.get_tensor("grids"),
            file.metadata(),
        )
    assert tokens.shape == (summary["tokens"]["out"], 64)
    assert tokens.isfinite().all()
    assert int(grids.prod(1).sum()) == len(tokens)
    plan = uhd_ops.SlicePlan.from_dict(json.loads(metadata["plan"]))
    assert plan.image_size == (400, 300)
    assert grids.tolist() == [[h // 2, w // 2] for h, w in plan.grids]


def test_encode_json(photo, capsys):
    code, folder = encode(photo, "--json", "--form", "tied", "--compare")
    assert code == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["image"] == str(photo)
    assert summary["views"] == len(uhd_ops.SlicePlan.from_dict(summary["plan"]).grids) > 1
    assert summary["tokens"]["in"] == 4 * summary["tokens"]["out"]
    assert summary["giga_macs"]["with"] < summary["giga_macs"]["without"]
    assert summary["seconds"].keys() == {"without", "with"}
    assert min(summary["seconds"].values()) > 0
    assert summary["device"] == "cpu"
    assert summary["model"] == {
        "name": MODEL,
        "depth": 6,
        "weights": "random (seed 0)",
        "dtype": "float32",
    }
    assert summary["compressor"] == {"layer": 2, "form": "tied"}
    assert set(summary["backends"]) == {"window_attention", "pixel_unshuffle_mlp"}


@pytest.mark.parametrize(
    "model",
    [
        "eva02_tiny_patch14_224",
        "naflexvit_base_patch16_siglip",
        "vit_relpos_small_patch16_224",
        "cait_xxs24_224",
        "samvit_base_patch16_224",
    ],
)
def test_encode_takes_every_family(model, photo, capsys):
    code, folder = encode(photo, "--model", model, "--max-slices", "1", "--json")
    assert code == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["model"]["name"] == model
    assert summary["tokens"]["out"] < summary["tokens"]["in"]
    assert 0 < summary["giga_macs"]["with"] < summary["giga_macs"]["without"]
    with safe_open(folder / "tokens.safetensors", "pt") as file:
        assert file.get_tensor("tokens").isfinite().all()


def test_encode_compares_on_request_only(photo, capsys):
    code, _ = encode(photo)
    assert code == 0
    assert "not run" in capsys.readouterr().out
    code, _ = encode(photo, "--json")
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["seconds"].keys() == {"with"}
    assert summary["giga_macs"]["with"] < summary["giga_macs"]["without"]  # counted


def test_encode_goes_on_after_a_bad_image(photo, capsys):
    out, cut = photo.parent / "out", photo.parent / "cut.png"
    cut.write_bytes(photo.read_bytes()[:2000])  # whole as far as its head tells
    images = [str(photo.parent / "nope.png"), str(cut), str(photo)]
    command = ["encode", *images, "--model", MODEL, "--layer", "2", "--json", "--out", str(out)]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].endswith("error: 2 of 3 images could not be encoded")
    missing, broken, summary = json.loads(printed.out)
    assert "No such file" in missing["error"]
    assert "cannot be read" in broken["error"]
    assert summary["tokens"]["out"] > 0
    assert [folder.name for folder in out.iterdir()] == ["photo"]


@pytest.mark.parametrize(
    ("name", "folder"), [("...png", "image"), ("..png", "image"), (".a.b.png", "a.b")]
)
def test_names_stay_inside(name, folder, photo):
    photo = photo.rename(photo.parent / name)
    code, _ = encode(photo)
    assert code == 0
    assert [path.name for path in (photo.parent / "out").iterdir()] == [folder]
    assert sorted(path.name for path in photo.parent.iterdir()) == sorted([name, "out"])


@pytest.mark.parametrize("link", ["photo", "photo/summary.json"])
def test_links_are_not_followed(link, photo, capsys):
    outside, path = photo.parent / "outside", photo.parent / "out" / link
    path.parent.mkdir(parents=True)
    outside.mkdir()
    (outside / "mine").write_text("mine")
    path.symlink_to(outside if link == "photo" else outside / "mine")
    code, _ = encode(photo)
    if link == "photo":
        assert code == 2
        assert "it is a symbolic link, and none is followed" in capsys.readouterr().err
    else:  # replaced by a file
        assert code == 0
        assert not path.is_symlink()
    assert [(file.name, file.read_text()) for file in outside.iterdir()] == [("mine", "mine")]


def test_encode_on_a_device_that_is_not_there(photo, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert encode(photo, "--device", "cuda")[0] == 2
    assert "--device cuda: torch finds no GPU on this machine" in capsys.readouterr().err


PLANNERS = {  # option: the function, and what it takes
    ("--max-slices", "4"): (uhd_ops.plan_slices, {"max_slices": 4, "scale_resolution": 160}),
    ("--native",): (uhd_ops.plan_native, {}),
    ("--native", "64"): (uhd_ops.plan_native, {"max_tokens": 64}),
}


def model_of(seed):
    """What ``encode --layer 2`` makes."""
    import timm

    torch.manual_seed(seed)
    return uhd_ops.insert_early_compressor(timm.create_model(MODEL, num_classes=0).eval(), 2)


def tokens_by_hand(vit, photo, plan):
    config = vit.pretrained_cfg
    pixels, grids = uhd_ops.pack_views(
        uhd_ops.slice_image(photo, plan), 16, mean=config["mean"], std=config["std"]
    )
    with torch.no_grad():
        return uhd_ops.nn.SliceEncoder(vit)(pixels, grids).tokens


@pytest.mark.parametrize("option", PLANNERS, ids=" ".join)
def test_encode_equals_the_library(option, photo, capsys):
    """The tokens are those of the public functions, called by hand."""
    _, folder = encode(photo, *option, "--seed", "3")
    printed = capsys.readouterr().out
    vit = model_of(seed=3)
    image = uhd_ops.load_image(photo)
    planner, options = PLANNERS[option]
    plan = planner(*image.size, patch_size=16, **options)
    where = "thumbnail" if plan.grid else "whole image at"
    assert f"{plan.num_views}: {where} {plan.thumbnail[0]}x{plan.thumbnail[1]} px" in printed
    expected = tokens_by_hand(vit, photo, plan)
    with safe_open(folder / "tokens.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("tokens"), expected)


def test_encode_two_images_of_one_name(photo, capsys):
    other = photo.parent / "other"
    other.mkdir()
    Image.new("RGB", (50, 60), "red").save(other / "photo.png")
    out = photo.parent / "out"
    options = ["--model", MODEL, "--layer", "2", "--dtype", "bfloat16", "--json", "--out", str(out)]
    assert main(["encode", str(photo), str(other / "photo.png"), *options]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["plan"]["grid"] is None, second["plan"]["grid"] is None) == (False, True)
    assert (out / "photo-2" / "summary.json").is_file()
    with safe_open(out / "photo" / "tokens.safetensors", "pt") as file:
        assert file.get_tensor("tokens").dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (1, 1)])
def test_encode_extreme_shapes(size, tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "teal").save(path)
    code, folder = encode(path)
    assert code == 0
    with Image.open(folder / "slices.png") as picture:
        assert min(picture.size) > 400
        assert max(picture.size) < 3000


def test_what_the_picture_shows(photo, drawn):
    """The photograph once, with its slices; the norms of the tokens on both sides of the merge."""
    _, folder = encode(photo)
    plan = uhd_ops.SlicePlan.from_dict(json.loads((folder / "summary.json").read_text())["plan"])
    image, before, after, *bars = drawn[0].axes
    slices = plan.num_slices
    assert slices > 1
    assert [len(axes.images) for axes in (image, before, after)] == [1, slices, slices]
    assert len(image.patches) == slices
    rows, columns = plan.grids[1]
    shapes = [{shown.get_array().shape for shown in axes.images} for axes in (before, after)]
    assert shapes == [{(rows, columns)}, {(rows // 2, columns // 2)}]
    seen, vit = {}, model_of(seed=0)
    vit.blocks[2].compressor.register_forward_hook(
        lambda module, inputs, output: seen.update({before: inputs[0], after: output})
    )
    tokens_by_hand(vit, photo, plan)
    for axes, x in seen.items():  # the thumbnail is not drawn
        norms = torch.cat([torch.tensor(shown.get_array()).flatten() for shown in axes.images])
        expected = x.norm(dim=1)[-len(norms) :]
        torch.testing.assert_close(norms.float(), expected, rtol=1e-4, atol=0)
    assert {bar.get_xlabel() for bar in bars} == {"L2 norm of a token"}
    title = "photo.png, test_vit after layer 2, weights: random (seed 0)"
    assert drawn[0]._suptitle.get_text() == title


def test_many_images_take_a_line_each(tmp_path, capsys):
    paths = [tmp_path / f"photo [{number}].png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (60 + 50 * number, 70), "teal").save(path)
    out = tmp_path / "out"
    options = ["--model", MODEL, "--layer", "2", "--max-slices", "1", "--out", str(out)]
    assert main(["encode", *map(str, paths), *options]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) <= len(paths) + 18
    assert not printed.err  # a terminal would show how far it is, and nothing of that afterwards
    summaries = [json.loads((out / p.stem / "summary.json").read_text()) for p in paths]
    for path, summary in zip(paths, summaries, strict=True):
        (line,) = [line for line in lines if str(path) in line]
        tokens = summary["tokens"]
        width, height = summary["plan"]["image_size"]
        expected = (
            f"{path}: {width}x{height} px, 1 view, {tokens['in']} to {tokens['out']} tokens, "
        )
        assert line.startswith(expected)
        assert line.endswith("s")
    sums = [sum(summary["tokens"][key] for summary in summaries) for key in ("in", "out")]
    (row,) = [line for line in lines if "tokens out" in line]
    assert [int(cell) for cell in row.split("│")[2:4]] == sums
    assert "75.0% saved" in row
    assert lines[-1].endswith(f"for each of 4 images into folders of {out}")


def test_costs_in_words(capsys):
    """Tiny numbers get small units; what takes longer is not said to save less than nothing."""
    summary = {
        "tokens": {"in": 8, "out": 2},
        "giga_macs": {"without": 4.1e-5, "with": 3.66e-5},
        "seconds": {"without": 0.0006, "with": 0.0017},
    }
    _report._show_costs([summary])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["MACs", "41 kMACs", "36.6 kMACs", "10.7% saved"] in rows
    assert ["time", "600 µs", "1.7 ms", "2.83 times as much"] in rows


def test_info(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{uhd_ops.build_info()}\n"
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == uhd_ops.build_info().to_dict()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["encode", "nope.jpg"], "No such file or directory: 'nope.jpg'"),
        (["encode", "{photo}", "--model", "vit_tinny"], "timm has no model 'vit_tinny'; it has"),
        (
            ["encode", "{photo}", "--model", "eva02_tiny_patch41_224"],
            "it has, for example, eva02_tiny_patch14_224",
        ),
        (
            ["encode", "{photo}", "--model", "resnet18"],
            "its stages reduce the resolution already, so vit takes no compressor",
        ),
        (["encode", "{photo}", "--model", "test_vit", "--layer", "6"], "layer must be in 0..5"),
        (["encode", "{text}"], "cannot be read: it is in no format that Pillow knows"),
        (
            ["encode", "{photo}", "--model", "test_vit", "--layer", "2", "--out", "{text}"],
            "cannot write the results",
        ),
    ],
)
def test_refuses(command, message, photo, capsys):
    text = photo.parent / "text.jpg"
    text.write_text("no image")
    out = [] if "--out" in command else ["--out", str(photo.parent / "out")]
    code = main([part.format(photo=photo, text=text) for part in command] + out)
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"uhd-ops {command[0]}: error: ")
    assert message in lines[0]
    assert not (photo.parent / "out").exists()  # nothing is left behind


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["encode", "x.jpg", "--layer", "-1"], "argument --layer: must be at least 0, got -1"),
        (
            ["encode", "x.jpg", "--max-slices", "0"],
            "argument --max-slices: must be at least 1, got 0",
        ),
        (["encode", "x.jpg", "--native", "64", "--max-slices", "2"], "not allowed with argument"),
        (["encode", "x.jpg", "--native", "15"], "argument --native: must be at least 16, got 15"),
        (
            ["encode", "--native", "x.jpg"],
            "must be a number of tokens, got 'x.jpg'; images stand before --native, or behind its",
        ),
        (["encode", "x.jpg", "--seed", "a"], "argument --seed: must be an integer, got 'a'"),
        (["encode", "x.jpg", "--seed", str(2**64)], "argument --seed: must be at most"),
        (["encode", "x.jpg", "--threads", "99999"], "argument --threads: must be at most 1024"),
    ],
)
def test_bad_arguments(command, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pretrained_without_network(photo):
    """One message, at once; the address answers nobody, and the cache is empty."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "uhd_ops",
            "encode",
            str(photo),
            "--pretrained",
            "--model",
            MODEL,
        ],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(photo.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Leave out --pretrained to run with random weights." in result.stderr


def test_missing_packages(photo):
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('rich', 'timm') else find(name, *a)\n"
        "from uhd_ops.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = run_python(code, "encode", str(photo))
    assert result.returncode == 2
    expected = "missing packages: rich, timm; install them with: pip install 'uhd_ops[cli]'\n"
    assert result.stderr == f"uhd-ops encode: error: {expected}"


def test_reader_that_goes_away():
    """As in ``uhd-ops info | head -1``: no traceback."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "uhd_ops", "info"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_import_is_light():
    heavy = "{'timm', 'transformers', 'torchvision', 'PIL', 'rich', 'matplotlib', 'safetensors'}"
    result = run_python(f"import sys, uhd_ops.cli; print({heavy} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr
