# SPDX-License-Identifier: Apache-2.0
"""The experiment on merges at several depths measures what it says; its page has its numbers."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def experiment():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("06_merge_stability")


@pytest.fixture(scope="module")
def results():
    return max((ROOT / "benchmarks" / "results").glob("stability_*.json"))


@pytest.fixture(scope="module")
def record(results):
    return json.loads(results.read_text())


def test_page_agrees_with_the_results(experiment, results, record):
    page = (ROOT / "docs" / "stability.md").read_text()
    assert experiment.tables(record) in page
    assert f"`{results.relative_to(ROOT)}`" in page


def test_results_are_complete(experiment, record):
    arms = [("untouched", None)]
    arms += [(pool, n) for n in experiment.IN_FRONT for pool in experiment.POOLS]
    assert len(record["seeds"]) >= 3
    found = [(row["seed"], row["arm"], row["start"]) for row in record["rows"]]
    assert found == [(seed, *arm) for seed in record["seeds"] for arm in arms]
    for row in record["rows"]:
        assert len(row["correct"]) == len(record["steps"])
        assert max(row["readable"], *row["correct"]) <= record["settings"]["test_images"]
    assert record["settings"]["in_front"] == {str(n): k for n, k in experiment.IN_FRONT.items()}
    assert not record["environment"]["uncommitted_changes"]


def test_depths_are_told_apart(experiment):
    blocks = list(experiment.IN_FRONT.values())
    assert blocks == sorted(set(blocks))
    assert (blocks[0], blocks[-1]) == (1, experiment.BLOCKS)


@torch.no_grad()
def test_what_is_measured(experiment):
    """Redundancy and similarity by hand, and a mean behind the last block."""
    torch.manual_seed(0)
    model, images = (
        experiment.warm_start.Classifier(experiment.BLOCKS).eval(),
        torch.randn(3, 1, 32, 32),
    )
    windows = [
        [8 * (2 * i + a) + 2 * j + b for a in (0, 1) for b in (0, 1)]
        for i in range(4)
        for j in range(4)
    ]
    for blocks in (2, experiment.BLOCKS):
        x = model.vit.patch_embed(images) + model.vit.pos_embed
        x = model.vit.norm_pre(x)
        for block in model.vit.blocks[:blocks]:
            x = block(x)
        tokens = x[:, windows]  # (3, 16, 4, C)
        means = tokens.mean(2)
        cosines = [functional.cosine_similarity(tokens[:, :, i], means, dim=-1) for i in range(4)]
        expected = float(torch.stack(cosines).mean())
        assert experiment.redundancy(model, images, blocks) == pytest.approx(expected, abs=1e-5)
    for pool in ("mean", "adaptive"):
        merged = experiment.insert(model, experiment.BLOCKS, pool)
        actual = experiment.tokens_of(merged, images)
        assert torch.allclose(actual, model.vit.norm(means), atol=1e-5)
    assert experiment.similarity(actual, 3 * actual) == pytest.approx(1, abs=1e-6)
    assert experiment.similarity(actual, -actual) == pytest.approx(-1, abs=1e-6)


def test_refusals(experiment, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["06_merge_stability.py", "--seeds", "0"])
    with pytest.raises(SystemExit, match="2"):
        experiment.main()
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
