# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops profile``: plans and counts are the library's, times are of what it says."""

import json
import math

import pytest
import timm
import torch
import transformers
from PIL import Image

from uhd_ops import (
    flops,
    insert_early_compressor,
    insert_progressive_compression,
    plan_native,
    plan_slices,
)
from uhd_ops.cli import _variants, main
from uhd_ops.cli._profile import crossings

MODEL = "test_vit"  # timm's smallest: 6 blocks of width 64, patch 16, 160 px, one class token
LLM = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture
def llm(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLM))
    return str(path)


def profile(capsys, *options, model=MODEL, layer="2"):
    assert main(["profile", model, "--layer", layer, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def rows_of(result):
    (model,) = result["models"]
    return {(tuple(row["size"]), row["variant"]): row for row in model["rows"]}


def test_counts_are_those_of_the_library(capsys):
    result = profile(capsys, "--sizes", "100,500x300", "--out-dim", "96", "--form", "tied")
    assert (result["run"], result["llm"], result["compared"]) == (None, None, "giga_macs")
    rows = rows_of(result)
    assert list(rows) == [
        (size, name) for size in ((100, 100), (500, 300)) for name in _variants.VARIANTS
    ]
    vits = {name: timm.create_model(MODEL, num_classes=0) for name in _variants.VARIANTS}
    insert_early_compressor(vits["early"], 2, form="tied")
    insert_progressive_compression(vits["progressive"], (0, 3))  # 4 and 18 of 27 blocks, of 6
    connectors = {"none": (1, 0), "early": (1, 1), "post": (2, 0), "native": (2, 0)}
    for (size, name), row in rows.items():
        if name == "native":
            plan = plan_native(*size, patch_size=16)
        else:
            plan = plan_slices(*size, patch_size=16, scale_resolution=160)
        assert (row["views"], row["grids"]) == (plan.num_views, [list(g) for g in plan.grids])
        assert row["tokens_vit"] == plan.num_tokens
        tokens = plan.num_tokens // (4 if name == "none" else 16)
        assert row["tokens_llm"] == tokens
        parts, tower = row["giga_macs"], flops.of_vit(vits[name], plan.grids)
        if name == "progressive":  # no merge: 64 to 64 to 96 channels
            connector = tokens * (64 * 64 + 64 * 96)
        else:
            stages, inside = connectors[name]
            grids = [(h // 2**inside, w // 2**inside) for h, w in plan.grids]
            sizes = flops.ViTConfig(dim=64, depth=1, heads=1, mlp_hidden=1, patch=1)
            connector = flops.count_vit(sizes, grids, connector=flops.ConnectorConfig(96, stages))[
                "connector"
            ].total
        assert parts["connector"] == pytest.approx(connector / 1e9, rel=1e-12)
        assert parts["patch_embed"] == tower["patch_embed"].total / 1e9
        blocks = [f"blocks.{index}" for index in range(6)]
        last = {"early": 2, "progressive": 0}.get(name, 5)
        front = sum(tower[block].total for block in blocks[: last + 1])
        inserted = sum(row.total for row in tower.layers if row.name.startswith("compressor"))
        assert parts["before"] == pytest.approx(front / 1e9, rel=1e-12)
        assert parts["compressor"] == pytest.approx(inserted / 1e9, rel=1e-12)
        assert parts["encode"] == pytest.approx((tower.total + connector) / 1e9, rel=1e-12)
        assert parts["total"] == parts["encode"]
        assert row["milliseconds"] is None


def test_other_families_are_traced(capsys):
    """One whose sizes do not tell: the trace of the encoder is that of the model on images."""
    name = "eva02_tiny_patch14_224"
    options = ["--sizes", "96", "--variants", "early", "--max-slices", "1"]
    (row,) = rows_of(profile(capsys, *options, model=name, layer="1")).values()
    vit = insert_early_compressor(timm.create_model(name, num_classes=0), 1)
    (grid,) = row["grids"]
    tower = flops.of_vit(vit, [grid])
    assert row["giga_macs"]["compressor"] == pytest.approx(tower["compressor"].total / 1e9)
    encode = row["giga_macs"]["encode"] - row["giga_macs"]["connector"]
    assert encode == pytest.approx(tower.giga)


def test_prefill(capsys, llm):
    """What is predicted of a length is what a trace of that length counts."""
    options = ["--sizes", "300", "--variants", "none,post", "--llm", llm, "--prompt", "5"]
    result = profile(capsys, *options)
    assert (result["prompt"], result["out_dim"]) == (5, 32)
    config = transformers.AutoConfig.for_model(**LLM)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for row in rows_of(result).values():
        embeds = torch.empty(1, row["tokens_llm"] + 5, 32)
        traced = flops.count_forward(model, inputs_embeds=embeds, logits_to_keep=1, use_cache=False)
        assert row["giga_macs"]["prefill"] == pytest.approx(traced.giga, rel=1e-12)
        sums = row["giga_macs"]["encode"] + row["giga_macs"]["prefill"]
        assert row["giga_macs"]["total"] == sums
    length = row["tokens_llm"] + 5
    c, kv, i = 2 * 16, 16, 48  # by hand: projections, MLP, full scores; then the head, once
    layer = length * (32 * (c + 2 * kv) + c * 32 + 3 * 32 * i) + 2 * length**2 * c
    assert [row.total for row in traced.layers[1:]] == [layer, layer, 32 * 50]
    assert _variants.PrefillCosts(model, "qwen3")._grows  # so it was not traced, but predicted


def test_prefill_that_does_not_grow_so(monkeypatch):
    """Where the second trace is not as predicted, every length is traced, once."""
    lengths = []

    def trace(self, tokens):
        lengths.append(tokens)
        attention = min(tokens, 20) * tokens
        row = flops.LayerCount("layers.0", tokens, linear=3 * tokens, attention=attention)
        return flops.FlopReport((row,), "macs")

    monkeypatch.setattr(_variants.PrefillCosts, "_trace", trace)
    costs = _variants.PrefillCosts(None, "sliding")
    assert [costs.of(n) for n in (10, 100, 100)] == [30 + 100, 300 + 2000, 300 + 2000]
    assert lengths == [16, 48, 10, 100]


def test_run(capsys, llm):
    options = ["--sizes", "64x200", "--llm", llm, "--run", "--rounds", "1", "--threads", "1"]
    result = profile(capsys, *options, "--device", "cpu")
    assert result["run"] == {"device": "cpu", "dtype": "float32", "rounds": 1, "threads": 1}
    assert result["compared"] == "milliseconds"
    for (_, name), row in rows_of(result).items():
        times = row["milliseconds"]
        merged = {"compressor", "behind"} if name in ("early", "progressive") else set()
        parts = {"patch_embed", "before", "connector", "prefill"} | merged
        assert times.keys() == parts | {"encode", "total"}
        assert min(times.values()) > 0
        assert times["total"] == pytest.approx(sum(times[part] for part in parts))
        assert times["encode"] == pytest.approx(times["total"] - times["prefill"])
    assert main(["profile", MODEL, "--layer", "2", *options]) == 0
    printed = capsys.readouterr().out
    assert "milliseconds by part, cpu, float32, 1 threads, median of 1" in printed
    assert max(map(len, printed.replace(llm, "llm").splitlines())) <= 80


def test_what_runs_is_what_was_planned():
    """The tokens that leave tower and connector are as many as the plan says, in every variant."""
    encoder = _variants.Encoder(
        timm.create_model(MODEL, num_classes=0).eval(), 6, "", 16, 160, (0.5,) * 3, (0.5,) * 3
    )
    options = _variants.Options(2, "dense", (0, 3), 9, 16384)
    timer, seen = _variants.Timer(encoder, options, 24, None), {}
    for stages, connector in timer.connectors.items():
        connector.register_forward_hook(
            lambda module, inputs, output, stages=stages: seen.update({stages: output.shape})
        )
    for name, variant in _variants.VARIANTS.items():
        plan = _variants.plan(variant, 500, 300, encoder, options)
        grids = _variants.PackedGrids(plan.grids)
        timer.time([name], {name: grids}, 0, 1)
        expected = _variants.tokens_out(variant, options, grids)
        assert seen[variant.stages] == (expected, 24)
    assert not any(hasattr(block, "compressor") for block in encoder.vit.blocks)


def test_crossings():
    def row(side, variant, cost):
        return {"size": [side, side], "variant": variant, "giga_macs": {"total": cost}}

    costs = {"a": (1.0, 2.0, 6.0, 8.0), "b": (2.0, 2.0, 4.0, 9.0), "c": (0.5, 0.6, 0.7, 0.8)}
    sides = (100, 200, 400, 500)
    rows = [row(s, name, costs[name][i]) for i, s in enumerate(sides) for name in costs]
    found = crossings(rows[::-1], "giga_macs")
    # a - b is -1, 0, 2, -1: from the last size at which they differ.
    assert [(c["below"], c["above"], c["between"]) for c in found] == [
        ("a", "b", [[100, 100], [400, 400]]),
        ("b", "a", [[400, 400], [500, 500]]),
    ]
    assert found[0]["side"] == 100 + 300 / 3
    assert found[1]["side"] == pytest.approx(400 + 100 * 2 / 3)
    assert found[1]["total"] == pytest.approx(6 + 2 * 2 / 3)


def test_plot_and_tables(capsys, drawn, tmp_path):
    path = tmp_path / "profile.png"
    options = ["--sizes", "200:320:120,640x480", "--variants", "post,native,post"]
    assert main(["profile", MODEL, MODEL, "--layer", "2", *options, "--plot", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote {path}\n")
    assert printed.count("whole images") == 2
    for size in ("200x200", "320x320", "640x480"):
        assert size in printed
    # One view takes fewer patches than a thumbnail and two slices, and many attend to each other.
    sentence = "native is cheaper than post up to about 245x245 px (between 200x200 and 320x320"
    assert " ".join(printed.split()).count(sentence) == 2
    with Image.open(path) as picture:
        assert min(picture.size) > 400
    rows = profile(capsys, *options)["models"][0]["rows"]
    for axes in drawn[0].axes:
        post, native, crossing = axes.lines
        for line in (post, native):
            expected = [
                [math.sqrt(math.prod(row["size"])), 1e9 * row["giga_macs"]["total"]]
                for row in sorted(rows, key=lambda row: math.prod(row["size"]))
                if row["variant"] == line.get_label()
            ]
            assert line.get_xydata().tolist() == expected
        assert crossing.get_xdata() == pytest.approx([245], abs=1)
        assert "1: native to post, 245 px" in {text.get_text() for text in axes.texts}


def test_default_layers():
    """Those of ViT-UHD, and as deep in other towers."""
    assert _variants.default_layers(27) == (3, 17)
    assert _variants.default_layers(12) == (1, 7)
    assert _variants.default_layers(1) == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vit_tinny"], "timm has no model 'vit_tinny'; it has"),
        (["resnet18"], "model resnet18: "),
        ([MODEL], "model test_vit: layer must be in 0..5 for a model of 6 blocks, got 6"),
        (
            [MODEL, "--layer", "2", "--progressive", "3,9"],
            "model test_vit: layers must be in 0..5 for a model of 6 blocks, got (3, 9)",
        ),
        ([MODEL, "--dtype", "float32"], "--dtype goes with --run"),
        ([MODEL, "--rounds", "2"], "--rounds goes with --run"),
        ([MODEL, "--prompt", "2"], "--prompt goes with --llm"),
        ([MODEL, "--llm", "qwen3", "--out-dim", "8"], "--out-dim goes without --llm"),
        ([MODEL, "--llm", "qwen33"], "--llm qwen33: neither a config.json nor a model type"),
        ([MODEL, "--llm", "qwen33"], "it has, for example, qwen3"),
        ([MODEL, "--llm", "siglip_vision_model"], "--llm siglip_vision_model: Unrecognized"),
        ([MODEL, "--llm", "{folder}/text"], "text: no config of transformers: "),
        ([MODEL, "--llm", "{folder}"], 'no config of transformers: it has no "model_type"'),
        ([MODEL, "--layer", "2", "--max-tokens", "15"], "max_tokens must be at least merge² = 16"),
        ([MODEL, "--layer", "2", "--plot", "{folder}/no/x.png"], "cannot write the plot: "),
    ],
)
def test_refuses(options, message, tmp_path, capsys):
    (tmp_path / "text").write_text("no json")
    (tmp_path / "config.json").write_text("[1]")
    options = [option.format(folder=tmp_path) for option in options]
    assert main(["profile", "--sizes", "100", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("uhd-ops profile: error: ")
    assert message in printed.err
    assert not printed.out


def test_weights_that_do_not_fit(monkeypatch, llm, capsys):
    monkeypatch.setattr(_variants.os, "sysconf", lambda name: 10)
    options = ["--sizes", "100", "--layer", "2", "--llm", llm, "--run", "--device", "cpu"]
    assert main(["profile", MODEL, *options]) == 2
    assert "its weights take 0.0 GB, and the device has 0.0 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "448,a"], "argument --sizes: must look like 448, 1920x1080 or 224:2240:112"),
        (["--sizes", "9:3:1"], "separated by commas, got '9:3:1'"),
        (["--sizes", "3x"], "separated by commas, got '3x'"),
        (["--sizes", "3x0"], "argument --sizes: must have sides of at least 1, got '3x0'"),
        (["--variants", "early,late"], "must be some of none, early, post, progressive, native"),
    ],
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["profile", MODEL, *options])
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr("uhd_ops.cli._support.importlib.util.find_spec", lambda name: None)
    assert main(["profile", MODEL, "--plot", "x.png"]) == 2
    assert "missing packages: timm, rich, matplotlib; install them with" in capsys.readouterr().err
