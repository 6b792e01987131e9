# SPDX-License-Identifier: Apache-2.0
"""An accelerated MiniCPM-V is still the model that it was, and restore() makes it so exactly."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from tiny_minicpm import (
    EVEN,
    MODELS,
    ODD,
    TOWERS,
    assert_close,
    images,
    randomized,
    tiny_model,
    tiny_tower,
)
from torch import nn
from transformers.models.minicpmv4_6 import modeling_minicpmv4_6 as modeling

from uhd_ops.integrations.transformers import accelerate, restore

VERSIONS = pytest.mark.parametrize("version", TOWERS)


def features(model, grids=ODD, **options):
    torch.manual_seed(1)
    pixels, sizes = images(grids, model.dtype)
    if hasattr(model, "get_image_features"):
        return torch.cat(model.get_image_features(pixels, sizes, **options).pooler_output)
    return model(pixels, target_sizes=sizes, **options).last_hidden_state


def classes(model):
    return [type(module) for module in model.modules()]


@VERSIONS
def test_restore_is_exact(version):
    model = tiny_model(version)
    expected, before = features(model, EVEN), classes(model)
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert accelerate(model) is model
    changed = [new for new, old in zip(classes(model), before, strict=True) if new is not old]
    assert (
        len(changed) == 3 + 2 + 4
    )  # attention in layers; the merger's and it; tower, model, connector, stage
    features(model)
    assert list(model.state_dict()) == list(state)
    assert restore(model) is model
    assert classes(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0].data_ptr()
        assert torch.equal(tensor, state[name][1])
    assert torch.equal(features(model, EVEN), expected)


def test_idempotent():
    tower = accelerate(tiny_tower())
    once, expected = classes(tower), features(tower)
    assert accelerate(tower) is tower
    assert classes(tower) == once
    assert torch.equal(features(tower), expected)
    restore(tower)
    assert type(tower) is TOWERS["4.6"]


def test_accelerated_again_after_a_part_was_replaced():
    model, other = accelerate(tiny_model()), tiny_tower()
    model.model.vision_tower = other
    accelerate(model)
    assert torch.equal(features(model.model.vision_tower), features(accelerate(other)))
    assert features(model).isfinite().all()


@VERSIONS
def test_found_inside_other_modules(version):
    tower = tiny_tower(version)
    around = nn.ModuleDict({"encoder": nn.Sequential(tower), "head": nn.Linear(2, 2)})
    assert accelerate(around) is around
    assert type(tower) is not TOWERS[version]
    restore(around)
    assert type(tower) is TOWERS[version]


@VERSIONS
def test_looks_the_same_from_outside(version):
    model = tiny_model(version)
    names = [(cls.__module__, cls.__qualname__, str(cls)) for cls in classes(model)]
    inherited = [cls.__mro__[0] for cls in classes(model)]
    accelerate(model)
    assert [(c.__module__, c.__qualname__, str(c)) for c in classes(model)] == names
    for module, cls in zip(model.modules(), inherited, strict=True):
        assert isinstance(module, cls)
    assert "uhd_ops" in repr(model.model.vision_tower.vit_merger)
    assert model.model.vision_tower.config_class is TOWERS[version].config_class


@VERSIONS
def test_recorded_outputs(version):
    tower = tiny_tower(version)
    pixels, sizes = images(EVEN)
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = copy.deepcopy(tower)(pixels, target_sizes=sizes, **options)
    actual = accelerate(tower)(pixels, target_sizes=sizes, **options)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs)
    assert actual.attentions == expected.attentions == ()
    last, *_ = tower(pixels, target_sizes=sizes, return_dict=False)
    assert torch.equal(last, actual.last_hidden_state)


@VERSIONS
def test_deepcopy_has_its_own_weights(version):
    model = accelerate(tiny_model(version))
    expected = features(model)
    clone = copy.deepcopy(model)
    assert classes(clone) == classes(model)
    nn.init.zeros_(model.model.vision_tower.vit_merger.linear_1.weight)
    nn.init.zeros_(model.model.merger.mlp[0].linear_2.weight)
    assert torch.equal(features(clone), expected)
    assert type(restore(clone)) is type(model)
    assert type(clone.model) is not type(model.model)


def test_pickle(tmp_path):
    tower = accelerate(tiny_tower())
    expected = features(tower)
    assert torch.equal(features(pickle.loads(pickle.dumps(tower))), expected)
    torch.manual_seed(1)
    pixels, sizes = images(ODD)
    torch.save((tower, pixels, sizes), tmp_path / "tower.pt")
    code = (
        "import sys, torch\n"
        "tower, pixels, sizes = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(tower(pixels, target_sizes=sizes).last_hidden_state, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "tower.pt")], check=True)
    assert_close(torch.load(tmp_path / "tower.pt"), expected)


@VERSIONS
def test_save_pretrained(version, tmp_path):
    model = tiny_model(version, dtype=torch.float32)
    model.save_pretrained(tmp_path / "before")
    accelerate(model)
    expected = features(model)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["architectures"] == [MODELS[version][1].__name__]
    loaded = MODELS[version][1].from_pretrained(tmp_path / "after").eval()
    assert_close(features(accelerate(loaded)), expected)  # weights aligned otherwise


def test_save_pretrained_of_the_tower(tmp_path):
    tower = tiny_tower(dtype=torch.float32)
    accelerate(tower).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MiniCPMV4_6VisionModel"]
    loaded = TOWERS["4.6"].from_pretrained(tmp_path).eval()
    assert_close(features(accelerate(loaded)), features(tower))


def test_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = accelerate(tiny_tower()).train()
        if checkpointing:
            tower.activation_checkpointing_enable()
        features(tower).square().sum().backward()
        grads.append([parameter.grad for parameter in tower.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)
    assert all(grad is not None for grad in grads[0])


def doubled(module, how):
    """Make a module compute twice what its parameters say, as if quantised, adapted or hooked."""
    cls, plain = type(module), module.forward
    if how == "class":
        namespace = {"forward": lambda self, x: 2 * cls.forward(self, x)}
        module.__class__ = type(cls.__name__, (cls,), namespace)
    elif how == "hook":
        module.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        module.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize("part", ["linear_1", "linear_2", "pre_norm", "act"])
@pytest.mark.parametrize("how", ["class", "hook", "forward"])
@pytest.mark.parametrize("where", ["merger.mlp.0", "vision_tower.vit_merger"])
def test_changed_modules_are_called_not_read(where, part, how):
    model = tiny_model()
    unchanged = features(model, EVEN)
    owner = model.model.get_submodule(where)
    owner.act = copy.deepcopy(owner.act)  # transformers has one for all models
    doubled(getattr(owner, part), how)
    expected = features(model, EVEN)
    assert_close(features(accelerate(model), EVEN), expected)
    assert (expected - unchanged).abs().max() > 0.01


def test_hooks_of_the_parts_run():
    model, seen = tiny_model(), []
    tower = model.model.vision_tower
    watched = [tower, tower.vit_merger, tower.vit_merger.self_attn, model.model.merger]
    watched += [model.model.merger.mlp[0]]
    watched += [layer.self_attn for layer in tower.encoder.layers]
    for module in watched:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    features(accelerate(model))
    assert {id(module) for module in seen} == {id(module) for module in watched}


def test_compiled():
    tower = accelerate(tiny_tower(num_hidden_layers=2, insert_layer_id=0))
    expected = features(tower)
    with torch.no_grad():
        actual = features(torch.compile(tower, backend="aot_eager"))
    assert_close(actual, expected)


def test_on_the_meta_device():
    with torch.device("meta"):
        tower = TOWERS["4.6"](tiny_tower().config)
    accelerate(tower)
    randomized(tower.to_empty(device="cpu").double())
    assert features(tower).isfinite().all()


# ---- what accelerate() and restore() refuse, and that nothing has changed then ---------------


class OwnForward(modeling.MiniCPMV4_6VisionAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnExtra(modeling.MiniCPMV4_6VisionModel):
    def another_method(self):
        return 1


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
