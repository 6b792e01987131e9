# SPDX-License-Identifier: Apache-2.0
"""What accelerate() and restore() refuse, and that nothing has changed then."""

import pytest
import torch
from tiny_minicpm import EVEN, assert_close, images, tiny_model, tiny_tower
from torch import nn
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6 as modeling

from uhd_ops.integrations.transformers import accelerate, restore


class OwnForward(modeling.MiniCPMV4_6VisionAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnExtra(modeling.MiniCPMV4_6VisionModel):
    def another_method(self):
        return 1


def classes(model):
    return [type(module) for module in model.modules()]


def refuse(model, error, match):
    before = classes(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match):
        accelerate(model)
    if before:
        assert classes(model) == before


@pytest.mark.parametrize("model", [None, "openbmb/MiniCPM-V-4_6", {}])
def test_no_module(model):
    refuse(model, TypeError, f"model must be a torch.nn.Module, got {type(model).__name__}")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        restore(model)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), modeling.MiniCPMV4_6VisionMLP(tiny_tower().config)]
)
def test_no_tower(model):
    refuse(
        model,
        NotImplementedError,
        r"model must contain transformers\..*\.MiniCPMV4_6VisionModel or "
        rf"transformers\..*\.MiniCPMV4_7VisionModel, got {type(model).__name__}$",
    )


def test_a_part_without_a_tower():
    refuse(tiny_tower().vit_merger, NotImplementedError, "got MiniCPMV4_6ViTWindowAttentionMerger$")


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_replaced_methods(how):
    model = tiny_model()
    module = model.model.vision_tower.encoder.layers[-1].self_attn
    if how == "subclass":
        module.__class__ = OwnForward
    else:  # as dispatching a model to several devices does
        module.forward = module.forward
    name = "OwnForward" if how == "subclass" else "the module itself"
    refuse(
        model,
        NotImplementedError,
        r"model\.vision_tower\.encoder\.layers\.2\.self_attn must leave "
        rf"MiniCPMV4_6VisionAttention\.forward as it is, but {name} replaces it",
    )


@pytest.mark.parametrize(
    ("part", "attribute"),
    [("vision_tower.vit_merger", "window_kernel_size"), ("merger", "merge_kernel_size")],
)
def test_other_windows(part, attribute):
    model = tiny_model()
    setattr(model.model.get_submodule(part), attribute, (1, 4))
    refuse(
        model,
        NotImplementedError,
        rf"model\.{part}\.{attribute} must be \(2, 2\), .* got \(1, 4\)",
    )


def test_a_subclass_that_replaces_nothing_is_welcome():
    tower = OwnExtra(tiny_tower().config).double().eval()
    pixels, sizes = images(EVEN)
    expected = tower(pixels, target_sizes=sizes).last_hidden_state
    out = accelerate(tower)(pixels, target_sizes=sizes).last_hidden_state
    assert_close(out, expected)
    assert tower.another_method() == 1
    assert type(restore(tower)) is OwnExtra


def test_nothing_to_restore():
    message = "model holds no module that accelerate.. changed, got MiniCPMV4_6VisionModel"
    with pytest.raises(ValueError, match=message):
        restore(tiny_tower())


def test_what_extended_an_accelerated_module_stays():
    tower = accelerate(tiny_tower())
    module, plain = tower.vit_merger, type(tower.vit_merger)
    module.__class__ = type("Sharded", (plain,), {})
    module.forward = module.forward  # as dispatching does
    before = classes(tower)
    assert classes(accelerate(tower)) == before
    with pytest.raises(NotImplementedError, match=r"vit_merger must have the class .* got Sharded"):
        restore(tower)
    assert classes(tower) == before


def test_wrong_number_of_tokens():
    tower = accelerate(tiny_tower())
    pixels, sizes = images(EVEN)
    with pytest.raises(RuntimeError, match="must match the size"):  # as the original
        tower(pixels[..., 8:], target_sizes=sizes)
    merger = accelerate(tiny_model()).model.merger
    x = torch.randn(1, 17, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be \(N, C\) with N = 16 tokens"):
        merger(x, torch.tensor([[4, 4]]))
