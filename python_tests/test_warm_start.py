# SPDX-License-Identifier: Apache-2.0
"""The warm-start experiment compares what it says, and its page says what was measured."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from uhd_ops.nn import ABLATION

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name.replace(".py", ""), EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return load("experiments.py")


@pytest.fixture(scope="module")
def experiment():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return load("04_warm_start.py")


@pytest.fixture(scope="module")
def record(report):
    return json.loads(report.newest("warm_start").read_text())


def test_page_agrees_with_the_results(report):
    page = (ROOT / "docs" / "warm_start.md").read_text()
    assert page == report.with_newest_results(page)
    assert len(page.splitlines()) <= 160
    for experiment in report.EXPERIMENTS:
        picture = report.newest(experiment).with_suffix(".png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 200_000


def test_results_are_complete(record, experiment):
    assert len(record["seeds"]) >= 3
    arms = {(arm.name, arm.start) for arm in experiment.ARMS}
    assert arms >= {(name, "reused") for name in ABLATION if name != "average pool"}
    assert arms >= {(name, "random") for name in ABLATION if name != "average pool"}
    found = [(row["arm"], row["start"], row["seed"]) for row in record["rows"]]
    assert sorted(found) == sorted((*arm, seed) for arm in arms for seed in record["seeds"])
    images = record["settings"]["test_images"]
    for row in record["rows"]:
        assert len(row["correct"]) == len(record["steps"])
        counts = [row["readable"], *row["correct"]]
        assert all(isinstance(n, int) and 0 <= n <= images for n in counts)
    settings = experiment.Settings(record["settings"]["epochs"])
    assert {key: record["settings"][key] for key in settings._fields} == settings._asdict()
    assert record["steps"] == experiment.measured_steps(settings)
    assert record["settings"]["peak_lr"] == experiment.PEAK_LR


def test_tables_by_hand(record, report):
    """One cell of each table."""
    images, name = record["settings"]["test_images"], "window attention + reused MLP"
    last = {start: {} for start in ("reused", "random")}
    for row in record["rows"]:
        if row["arm"] == name:
            last[row["start"]][row["seed"]] = 100 * row["correct"][-1] / images
    tables = report.tables(record).splitlines()
    reused, random = (list(last[start].values()) for start in last)
    assert list(last["reused"]) == list(last["random"])
    lines = [line.split(" | ") for line in tables if line.startswith(f"| {name} |")]
    expected = f"{statistics.mean(reused):.1f} ± {statistics.stdev(reused):.1f}"
    assert (lines[0][1], lines[0][6]) == ("reused", expected)
    gain = [a - b for a, b in zip(reused, random, strict=True)]
    assert lines[2][5] == f"{statistics.mean(gain):+.1f} ± {statistics.stdev(gain):.1f} |"


def parameters(model):
    return dict(model.named_parameters())


def test_references_insert_nothing(experiment):
    torch.manual_seed(0)
    trained = experiment.Classifier()
    untouched, post = (experiment.compress(trained, arm) for arm in experiment.ARMS[:2])
    assert parameters(untouched).keys() == parameters(trained).keys()
    added = {name for name in parameters(post) if name.startswith("connector.stages.0.")}
    for name, parameter in parameters(post).items():
        if name not in added:  # the trained merge moved behind the new one
            original = parameters(trained)[name.replace("stages.1.", "stages.0.")]
            assert torch.equal(parameter, original)
            assert parameter is not original
    assert len(parameters(post)) == len(parameters(trained)) + len(added)


@pytest.mark.parametrize("index", range(2, 17))
def test_only_the_start_differs(experiment, index):
    torch.manual_seed(0)
    trained = experiment.Classifier()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.2)
    arm, block = experiment.ARMS[index], trained.vit.blocks[experiment.LAYER]
    model = experiment.compress(trained, arm)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, experiment.CLASSES)
    assert all(torch.equal(parameters(model)[n], p) for n, p in parameters(trained).items())
    inserted = parameters(model.vit.blocks[experiment.LAYER].compressor)
    assert bool(inserted) is bool(arm.start)
    if arm.start == "reused" and arm.options["attention"] != "none":
        assert torch.equal(inserted["attn.qkv.weight"], block.attn.qkv.weight)
    if arm.start == "reused" and arm.options["mlp"] == "reuse":
        rows, columns = block.mlp.fc1.weight.shape
        assert torch.equal(inserted["mlp.fc1.weight"][:rows, :columns], block.mlp.fc1.weight)
    for name, parameter in inserted.items() if arm.start == "random" else ():
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        else:
            bound = inserted[name.replace("bias", "weight")].shape[-1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, name


def test_readout(experiment):
    """Classes that the mean token tells apart are found; those it does not, are not."""
    tokens_as_they_are = SimpleNamespace(
        eval=lambda: None, vit=SimpleNamespace(forward_features=lambda tokens: tokens)
    )
    torch.manual_seed(0)
    labels = torch.arange(200) % experiment.CLASSES
    tokens = torch.randn(200, 4, experiment.CLASSES)  # mean 0, and the class on top of it
    tokens = tokens - tokens.mean(1, keepdim=True)
    told = tokens + torch.eye(experiment.CLASSES)[labels][:, None]
    data = (told[:150], labels[:150], told[150:], labels[150:])
    assert experiment.count_readable(tokens_as_they_are, data) == 50
    data = (tokens[:150], labels[:150], tokens[150:], labels[150:])
    assert experiment.count_readable(tokens_as_they_are, data) <= 20


def test_stages_train_what_they_say(experiment, monkeypatch):
    seen = []

    def note(model, data, epochs, peak_lr, measure):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        seen.append(
            {n.split(".compressor")[0] + ".compressor" * (".compressor" in n) for n in names}
        )

    monkeypatch.setattr(experiment, "train", note)
    data = (None, None, torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.long))
    ours = next(arm for arm in experiment.ARMS if arm.name == experiment.OURS)
    for arm in (ours, experiment.ARMS[0]):
        model = experiment.compress(experiment.Classifier(), arm)
        experiment.fine_tune(model, data, experiment.Settings(2))
    behind = {n for n in seen[0] if not n.startswith("vit.")}
    assert behind == {n for n, _ in model.named_parameters() if not n.startswith("vit.")}
    assert seen[0] - behind == {f"vit.blocks.{experiment.LAYER}.compressor"}
    assert seen[1] > seen[0]
    assert seen[1] - seen[0] == {n for n, _ in model.named_parameters() if n.startswith("vit.")}
    assert seen[2] == behind
    assert seen[3] == set(parameters(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "1"], "--epochs must be at least 2, got 1"),
    ],
)
def test_refusals(experiment, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["04_warm_start.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        experiment.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["sklearn.datasets", "timm.models.vision_transformer", "matplotlib.figure"]
)
def test_missing_packages_are_named(monkeypatch, module):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "experiments", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"{module}.*pip install 'uhd_ops\[examples\]'"):
        load("04_warm_start.py")
