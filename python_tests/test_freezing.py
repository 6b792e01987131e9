# SPDX-License-Identifier: Apache-2.0
"""freeze_for_stage, of a tower alone: what was inserted, then everything."""

import copy

import pytest
import torch
from families.case import random_images as images
from families.vision_transformer import make as tiny_vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uhd_ops import freeze_for_stage, insert_early_compressor, remove_early_compressor
from uhd_ops.nn import ABLATION, SliceEncoder

LAYER = 1


def trainable(vit):
    return {name for name, parameter in vit.named_parameters() if parameter.requires_grad}


def names(vit):
    return {name for name, _ in vit.named_parameters()}


def inserted(vit):
    return {name for name in names(vit) if f"blocks.{LAYER}.compressor." in name}


@pytest.mark.parametrize("name", ABLATION)
def test_stages_of_every_variant(name):
    vit = insert_early_compressor(tiny_vit(init_values=0.3), LAYER, **ABLATION[name])
    assert bool(inserted(vit)) is (name != "average pool")
    assert freeze_for_stage(vit, 1) is vit
    assert trainable(vit) == inserted(vit)
    for stage in (2, 3, 4):
        assert freeze_for_stage(vit, stage) is vit
        assert trainable(vit) == names(vit)
    freeze_for_stage(vit, 1)
    assert trainable(vit) == inserted(vit)


def test_a_step_of_stage_1_moves_only_what_was_inserted():
    vit = freeze_for_stage(insert_early_compressor(tiny_vit(), LAYER), 1)
    before = copy.deepcopy(vit.state_dict())
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)
    vit(images(vit)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in vit.named_parameters() if not torch.equal(p, before[name])}
    assert moved == inserted(vit)
    freeze_for_stage(vit, 2)
    optimizer.zero_grad()
    vit(images(vit)).square().sum().backward()
    assert {name for name, p in vit.named_parameters() if p.grad is not None} == names(vit)


def test_modules_that_contain_the_model():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    both = nn.ModuleDict({"encoder": SliceEncoder(vit), "connector": nn.Linear(32, 8)})
    freeze_for_stage(both, 1)
    assert trainable(both) == inserted(both) != set()
    freeze_for_stage(both, 2)
    assert trainable(both) == names(both)
    freeze_for_stage(both["encoder"], 1)  # what stands outside is left alone
    assert trainable(both) == inserted(both) | {"connector.weight", "connector.bias"}


def test_values_buffers_and_training_mode_stay():
    vit = insert_early_compressor(tiny_vit(), LAYER).train()
    vit.blocks[0].eval()
    integers = nn.Parameter(torch.arange(3), requires_grad=False)  # as quantised weights have
    vit.register_parameter("codes", integers)
    vit.register_buffer("table", torch.ones(2))
    state, modes = copy.deepcopy(vit.state_dict()), [m.training for m in vit.modules()]
    for stage in (1, 2):
        freeze_for_stage(vit, stage)
        assert [m.training for m in vit.modules()] == modes
        assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
        assert not vit.codes.requires_grad
        assert not vit.table.requires_grad


def test_a_removed_compressor_leaves_a_model_that_can_train():
    vit = freeze_for_stage(insert_early_compressor(tiny_vit(), LAYER), 2)
    remove_early_compressor(vit)
    assert trainable(vit) == names(vit)
    with pytest.raises(ValueError, match="model must hold a compressor, got a VisionTransformer"):
        freeze_for_stage(vit, 1)


BAD = {
    "no compressor": (tiny_vit, 1, ValueError, r"without one; call insert_early_compressor\(model"),
    "no module": (lambda: "vit", 1, TypeError, "model must be a torch.nn.Module, got str"),
    "stage 0": (None, 0, ValueError, "stage must be 1 to 4 for recipe 'v4', got 0"),
    "stage 5": (None, 5, ValueError, "stage must be 1 to 4 for recipe 'v4', got 5"),
    "stage 1.0": (None, 1.0, TypeError, "stage must be an int, got float"),
    "stage True": (None, True, TypeError, "stage must be an int, got bool"),
    "stage None": (None, None, TypeError, "stage must be an int, got NoneType"),
}


@pytest.mark.parametrize(("make", "stage", "error", "message"), BAD.values(), ids=BAD)
def test_refusals_change_nothing(make, stage, error, message):
    vit = insert_early_compressor(tiny_vit(), LAYER) if make is None else make()
    flags = None
    if isinstance(vit, VisionTransformer):
        vit.pos_embed.requires_grad_(False)
        flags = trainable(vit)
    with pytest.raises(error, match=message):
        freeze_for_stage(vit, stage)
    if flags is not None:
        assert trainable(vit) == flags
