# SPDX-License-Identifier: Apache-2.0
"""Parts of a whole model in the stages of the papers; docs/training.md."""

import re
from pathlib import Path

import pytest
import torch
from families.vision_transformer import make as tiny_vit
from ranks import process_group
from torch import nn

from uhd_ops import insert_early_compressor, insert_progressive_compression
from uhd_ops.nn import EarlyCompressor, PixelUnshuffleConnector, freeze_for_stage, param_groups

ALL = {"compressor", "tower", "connector", "llm"}
NAMED = {"tower": "tower", "connector": "connector", "llm": ("llm", "lm_head")}


class Whole(nn.Module):
    def __init__(self, compressed=True):
        super().__init__()
        vit = tiny_vit(num_classes=0)
        self.tower = insert_early_compressor(vit, 1) if compressed else vit
        self.connector = PixelUnshuffleConnector(32, 24)
        self.llm = nn.ModuleDict({"embed": nn.Embedding(7, 24), "norm": nn.LayerNorm(24)})
        self.lm_head = nn.Linear(24, 7, bias=False)
        self.lm_head.weight = self.llm["embed"].weight


def part_of(name):
    if ".compressor." in name:
        return "compressor"
    head = name.partition(".")[0]
    return "llm" if head == "lm_head" else head


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# From docs/training.md, row by row: the parts that train, with their rates.
STAGES = {
    ("v4", 1): {"compressor": 1e-4, "connector": 1e-4},
    ("v4", 2): {"compressor": 1e-5, "tower": 1e-5},
    ("v4", 3): dict.fromkeys(ALL, 5e-5),
    ("v4", 4): dict.fromkeys(ALL, 1e-5),
    ("v4-onevision", 1): {"compressor": 1e-4, "connector": 1e-4},
    ("v4-onevision", 2): dict.fromkeys(ALL, 1e-5),
    ("v4-onevision", 3): dict.fromkeys(ALL, 5e-5),
    ("v4-onevision", 4): dict.fromkeys(ALL, 1e-5),
    ("v4-code", 1): {"compressor": 1e-4, "connector": 1e-4},
    ("v4-code", 2): {"compressor": 2e-6, "tower": 2e-6, "connector": 2e-6, "llm": 1e-5},
    ("v4-code", 3): {"compressor": 1e-5, "tower": 1e-5, "connector": 1e-5, "llm": 5e-5},
    ("v4-code", 4): dict.fromkeys(ALL, 1e-5),
    ("v3-code", 1): {"compressor": 1e-5, "tower": 1e-5, "connector": 2e-4},
    ("v3-code", 2): {"compressor": 1e-5, "tower": 1e-5, "connector": 2e-5, "llm": 2e-5},
    ("v3-code", 3): {"compressor": 1e-5, "tower": 1e-5, "connector": 2e-5, "llm": 2e-5},
}


@pytest.mark.parametrize(("recipe", "stage"), STAGES, ids=str)
def test_stages_of_a_whole_model(recipe, stage):
    model, rates = Whole(), STAGES[recipe, stage]
    assert freeze_for_stage(model, stage, recipe=recipe, **NAMED) is model
    named = dict(model.named_parameters())
    assert trainable(model) == {name for name in named if part_of(name) in rates}
    names = {id(parameter): name for name, parameter in named.items()}
    for no_decay in (False, True):
        groups = param_groups(model, stage, recipe=recipe, no_decay=no_decay, **NAMED)
        listed = [names[id(p)] for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(trainable(model))  # each once, the tied ones too
        assert {group["name"].partition(".")[0]: group["lr"] for group in groups} == rates
        for group in groups:
            kinds = {part_of(names[id(p)]) for p in group["params"]}
            assert kinds == {group["name"].partition(".")[0]}
            bare = group["name"].endswith(".no_decay")
            assert group.get("weight_decay") == (0.0 if bare else None)
            if no_decay:
                assert all((p.ndim <= 1) is bare for p in group["params"])
        assert any(group["name"].endswith(".no_decay") for group in groups) is no_decay
        torch.optim.AdamW(groups, weight_decay=0.01)


def test_parts_by_module_name_and_parameter():
    model = Whole()
    model.separator = nn.Parameter(torch.zeros(24))
    expected = {"connector": ("connector", "separator"), "llm": ["llm", "lm_head"]}
    freeze_for_stage(model, 1, tower="tower", **expected)
    flags = trainable(model)
    assert {part_of(name) for name in flags} == {"compressor", "connector", "separator"}
    freeze_for_stage(model, 4, tower="tower", **expected)
    modules = {"tower": model.tower, "llm": (model.llm, model.lm_head)}
    freeze_for_stage(model, 1, connector=[model.connector, "separator"], **modules)
    assert trainable(model) == flags


def test_a_second_name_of_a_tied_parameter():
    parts = {"tower": "tower", "connector": ("connector", "llm.norm"), "llm": "lm_head"}
    groups = param_groups(freeze_for_stage(Whole(), 4, **parts), 4, **parts)
    assert [len(group["params"]) for group in groups if group["name"] == "llm"] == [1]


def test_a_compressor_in_the_connector_is_part_of_it():
    model = Whole()
    model.connector = nn.ModuleList([model.connector, EarlyCompressor(24, 2)])
    freeze_for_stage(model, 2, **NAMED)
    assert {part_of(name) for name in trainable(model)} == {"tower", "compressor"}


def test_without_a_compressor_the_connector_aligns():
    model = freeze_for_stage(Whole(compressed=False), 1, **NAMED)
    assert {part_of(name) for name in trainable(model)} == {"connector"}
    assert [group["name"] for group in param_groups(model, 1, **NAMED)] == ["connector"]


def test_a_compressor_of_another_class():
    """As MiniCPM-V's vit_merger, which stands beside the layers of its tower."""
    model = Whole(compressed=False)
    model.tower.merger = nn.Linear(4, 4)
    freeze_for_stage(model, 1, compressor="tower.merger", **NAMED)
    assert trainable(model) == {
        *(name for name, _ in model.named_parameters() if name.startswith("connector.")),
        "tower.merger.weight",
        "tower.merger.bias",
    }
    groups = param_groups(model, 1, compressor=model.tower.merger, **NAMED)
    assert [group["name"] for group in groups] == ["compressor", "connector"]


def test_groups_of_a_tower_alone():
    vit = insert_progressive_compression(tiny_vit(), (0, 1))
    assert [group["name"] for group in param_groups(freeze_for_stage(vit, 1), 1)] == ["compressor"]
    vit.head.requires_grad_(True)
    groups = param_groups(vit, 1, rates={"tower": 1e-3})
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("compressor", 1e-4),
        ("tower", 1e-3),
    ]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in vit.head.parameters()}


def test_what_does_not_train_may_be_said():
    model = freeze_for_stage(Whole(), 3, **NAMED)
    model.llm.requires_grad_(False)
    groups = param_groups(model, 3, rates={"llm": None, "tower": 1}, **NAMED)
    rates = [(group["name"], group["lr"]) for group in groups]
    assert rates == [("compressor", 5e-5), ("tower", 1.0), ("connector", 5e-5)]


class Alien(nn.Module):
    pass


BAD = {
    "stage 4 of v3": ({"recipe": "v3-code", "stage": 4}, ValueError, "stage must be 1 to 3"),
    "recipe": ({"recipe": "v5"}, ValueError, 'recipe must be "v4", .* or "v3-code", got \'v5\''),
    "unknown name": ({"llm": "lm"}, ValueError, "llm must name modules .* got 'lm', which a Whole"),
    "half a name": ({"llm": ("ll", "lm_head")}, ValueError, "got 'll', which"),
    "foreign module": ({"llm": Alien()}, ValueError, "llm must be in model, got a Alien that it"),
    "no name": ({"connector": 3}, TypeError, "connector must be a name, .* got int"),
    "no name in several": ({"llm": ["llm", None]}, TypeError, "llm must be a name.* got NoneType"),
    "uncovered": ({"llm": None}, ValueError, "got 3 in none of those named, llm.embed.weight"),
    "twice": ({"llm": ("llm", "connector")}, ValueError, "one part, got connector and llm"),
    "compressor elsewhere": ({"compressor": "llm"}, ValueError, "got llm and compressor"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_refusals_change_nothing(options, error, message):
    model = Whole()
    model.llm["norm"].bias.requires_grad_(False)
    before = trainable(model)
    options = {"stage": 1, **NAMED, **options}
    for function in (freeze_for_stage, param_groups):
        with pytest.raises(error, match=message):
            function(model, **options)
        assert trainable(model) == before


def test_a_parameter_that_cannot_train_stops_it_before_anything_is_changed():
    model = Whole().requires_grad_(False)
    with torch.inference_mode():
        model.lm_head.bias = nn.Parameter(torch.zeros(7), requires_grad=False)
    with pytest.raises(ValueError, match=r"got lm_head\.bias, made in inference mode"):
        freeze_for_stage(model, 3, **NAMED)
    assert trainable(model) == set()
    freeze_for_stage(model, 1, **NAMED)


BAD_GROUPS = {
    "not frozen": (3, {}, 1, {}, ValueError, r"none for the tower, and tower\.\S+ requires"),
    "still frozen": (1, {}, 3, {}, ValueError, "no parameter of the tower requires a gradient"),
    "rate dropped": (3, {}, 3, {"rates": {"llm": None}}, ValueError, "none for the llm"),
    "zero": (3, {}, 3, {"rates": {"llm": 0}}, ValueError, "positive and finite, got 0"),
    "infinite": (3, {}, 3, {"rates": {"llm": float("inf")}}, ValueError, "finite, got inf"),
    "text": (3, {}, 3, {"rates": {"llm": "1e-5"}}, TypeError, r"rates\['llm'\] must be a number"),
    "bool": (3, {}, 3, {"rates": {"llm": True}}, TypeError, "number or None, got bool"),
    "part": (3, {}, 3, {"rates": {"vit": 1.0}}, ValueError, "must be \"compressor\", .* got 'vit'"),
    "no mapping": (3, {}, 3, {"rates": [1.0]}, TypeError, "rates must be a mapping, got list"),
}


@pytest.mark.parametrize(
    ("frozen", "parts", "stage", "options", "error", "message"), BAD_GROUPS.values(), ids=BAD_GROUPS
)
def test_groups_that_would_not_train_what_the_stage_says(
    frozen, parts, stage, options, error, message
):
    model = freeze_for_stage(Whole(), frozen, **NAMED)
    with pytest.raises(error, match=message):
        param_groups(model, stage, **NAMED, **parts, **options)


# torch's own linear layers return views of batches, too; nothing changes them in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_page(tmp_path):
    """The code of docs/training.md runs: every stage trains what it should, and nothing else."""
    page = Path(__file__).resolve().parent.parent / "docs" / "training.md"
    text = page.read_text()
    moved = []

    def batches(stage):
        model = namespace["model"]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        yield torch.randn(2, 3, 64, 64), torch.randint(100, (2, 4))
        changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        moved.append({part_of(name) for name in changed})

    namespace = {"batches": batches}
    with process_group(0, 1, tmp_path / "rendezvous"):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page.name, "exec"), namespace)
    stages = (1, 2, 3, 4, 1, 1)  # the last two on many devices
    assert moved == [set(STAGES["v4", stage]) for stage in stages]
    merged = namespace["grids"].merged(4).num_tokens
    assert namespace["tokens"].shape == (merged, 48)
    rows = re.findall(r"^\| (\d), .*", text, re.MULTILINE)
    assert rows == ["1", "2", "3", "4"]
