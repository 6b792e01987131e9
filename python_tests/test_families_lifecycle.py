# SPDX-License-Identifier: Apache-2.0
"""Every family stays the model that it was: training, copying, compiling, pruning, removal."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from families import all_cases
from test_families import LAYER, VARIANTS, features_of, first
from timm.optim import param_groups_layer_decay
from torch.utils._pytree import tree_leaves, tree_map

from uhd_ops import insert_early_compressor, remove_early_compressor

CASES = all_cases()
NAMES = pytest.mark.parametrize("name", CASES)
HEADLESS = {"Gemma4VitEncoder", "Qwen3VitEncoder", "DeepseekVitEncoder"}
COMPRESSOR = ".compressor."


def made(name, variant=None, dtype=torch.float32, **options):
    """Return the case, its model with a compressor, and an input."""
    case = CASES[name]
    model = case.make(**(first(case) if variant is None else case.variants[variant])).to(dtype)
    return case, insert_early_compressor(model, LAYER, **options), case.images(model, 2, dtype)


def snapshot(model):
    """Everything that a user of the model could see of it."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "info": copy.deepcopy(getattr(model, "feature_info", None)),
        "keys": list(model.state_dict()),
        "pointers": [p.data_ptr() for p in model.parameters()],
        "repr": repr(model),
    }


def run(model, x):
    return features_of(model.forward_features(x))


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_removal_restores_everything(name, variant):
    case = CASES[name]
    model = case.make(**case.variants[variant])
    x = case.images(model, 2, torch.float32)
    before = snapshot(model)
    with torch.no_grad():
        expected = run(model, x)
        insert_early_compressor(model, LAYER)
        assert run(model, x).shape != expected.shape
        assert remove_early_compressor(model) is model
        assert snapshot(model) == before
        assert torch.equal(run(model, x), expected)


@NAMES
def test_original_keys_survive(name):
    case = CASES[name]
    model = case.make(**first(case))
    keys = list(model.state_dict())
    insert_early_compressor(model, LAYER)
    inserted = list(model.state_dict())
    assert [key for key in inserted if COMPRESSOR not in key] == keys
    assert any(key.startswith(f"{case.blocks}.{LAYER}.compressor.") for key in inserted)


@NAMES
def test_twice_and_out_of_range(name):
    case, model, _ = made(name)
    assert insert_early_compressor(model, LAYER) is model
    with pytest.raises(ValueError, match="vit holds a compressor already"):
        insert_early_compressor(model, LAYER, form="tied")
    model = case.make(**first(case))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.3 for a model of 4 blocks, got 4"):
        insert_early_compressor(model, 4)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="vit holds no compressor"):
        remove_early_compressor(model)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_every_parameter_learns(name, variant):
    case = CASES[name]
    model = case.make(**case.variants[variant])
    x = case.images(model, 2, torch.float32)
    run(model, x).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    insert_early_compressor(model, LAYER).zero_grad()
    run(model, x).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} == without
    for key, parameter in model.named_parameters():
        if COMPRESSOR in key:
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@NAMES
def test_bfloat16(name):
    _, model, x = made(name, dtype=torch.bfloat16)
    assert {p.dtype for key, p in model.named_parameters() if COMPRESSOR in key} <= {
        p.dtype for key, p in model.named_parameters() if COMPRESSOR not in key
    }
    with torch.no_grad():
        out = run(model, x)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@NAMES
def test_meta_device(name):
    case = CASES[name]
    plain = case.make(**first(case)).to("meta")
    with torch.device("meta"):  # as where a model is made without memory
        model = insert_early_compressor(copy.deepcopy(plain), LAYER)
    for each in (model, insert_early_compressor(plain, LAYER)):
        assert all(p.is_meta for p in each.parameters())


@NAMES
@torch.no_grad()
def test_copies_are_their_own(name):
    _, model, x = made(name)
    expected = run(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, x), expected)
        for key, parameter in clone.named_parameters():
            if COMPRESSOR in key:
                parameter.zero_()
        assert not torch.equal(run(clone, x), expected)
        assert torch.equal(run(model, x), expected)
        assert type(remove_early_compressor(clone)) is type(model).body_class
    loaded = CASES[name].make(**first(CASES[name]))
    insert_early_compressor(loaded, LAYER).load_state_dict(model.state_dict())
    assert torch.equal(run(loaded, x), expected)


@NAMES
@torch.no_grad()
def test_compile(name):
    case, model, x = made(name)
    expected = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(
        model.forward_features, backend="eager", fullgraph=case.fullgraph, dynamic=False
    )
    assert torch.equal(features_of(compiled(x)), expected)
    assert torch.equal(run(model, x), expected)


@NAMES
def test_gradient_checkpointing(name):
    case, model, x = made(name)
    if not hasattr(model, "set_grad_checkpointing"):
        pytest.fail(f"{name} has no gradient checkpointing: say so in its case")
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        # Another forward pass, of another size where that is possible, must not leave its layout.
        out = run(model, x)
        with torch.no_grad():
            run(model, case.images(model, 1, torch.float32, case.sizes[-1] if case.sizes else None))
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@NAMES
@torch.no_grad()
def test_signatures_stay_and_later_keywords_pass_through(name, monkeypatch):
    """A version of the library that adds a keyword to a method needs no change here."""
    case = CASES[name]
    model, seen = case.make(**first(case)), []
    cls = type(model)
    names = [n for n in ("forward_features", "forward_intermediates") if hasattr(cls, n)]
    for method in names:
        owner = next(c for c in cls.__mro__ if method in vars(c))
        monkeypatch.setattr(owner, method, with_keyword(getattr(owner, method), seen))
    # A class that no earlier test has compressed: the methods are adapted once for each class.
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    signatures = {n: inspect.signature(getattr(model, n)) for n in names}
    insert_early_compressor(model, LAYER)
    x = case.images(model, 2, torch.float32)
    for method, signature in signatures.items():
        assert inspect.signature(getattr(model, method)) == signature
        expected = getattr(model, method)(x)
        seen.clear()
        actual = getattr(model, method)(x, later="new")
        assert seen == ["new"]
        assert all(tree_leaves(tree_map(torch.equal, actual, expected)))


def with_keyword(method, seen):
    """``method`` as a later version might have it, with one more keyword."""

    @functools.wraps(method)
    def newer(self, *args, later="old", **kwargs):
        seen.append(later)
        return method(self, *args, **kwargs)

    signature = inspect.signature(method)
    *parameters, last = signature.parameters.values()
    added = inspect.Parameter("later", inspect.Parameter.KEYWORD_ONLY, default="old")
    variadic = last.kind is inspect.Parameter.VAR_KEYWORD
    parameters += [added, last] if variadic else [last, added]
    newer.__signature__ = signature.replace(parameters=parameters)
    return newer


@NAMES
def test_optimiser_groups(name):
    case = CASES[name]
    model = case.make(**first(case))

    def groups(model):
        return {
            key: group["lr_scale"]
            for group in param_groups_layer_decay(model)
            for key in [
                n for n, p in model.named_parameters() if any(p is q for q in group["params"])
            ]
        }

    before, kept = groups(model), set(model.no_weight_decay())
    insert_early_compressor(model, LAYER)
    after = groups(model)
    assert {key: scale for key, scale in after.items() if COMPRESSOR not in key} == before
    scales = {scale for key, scale in after.items() if COMPRESSOR in key}
    block = f"{case.blocks}.{LAYER}."
    assert scales == {scale for key, scale in before.items() if key.startswith(block)}
    assert {key for key in model.no_weight_decay() if COMPRESSOR not in key} == kept


@pytest.mark.parametrize("name", sorted(HEADLESS))
def test_encoders_have_no_classifier(name):
    assert not hasattr(CASES[name].make(**first(CASES[name])), "reset_classifier")


@pytest.mark.parametrize("name", [name for name in CASES if name not in HEADLESS])
@torch.no_grad()
def test_reset_classifier(name):
    case = CASES[name]
    model = case.make(**first(case))
    x = case.images(model, 2, torch.float32)
    model.reset_classifier(3)
    shape = model(x).shape
    insert_early_compressor(model, LAYER)
    model.reset_classifier(7)
    assert model(x).shape == (*shape[:-1], 7)


@NAMES
@torch.no_grad()
def test_prune_intermediate_layers(name):
    case = CASES[name]
    for last in (0, 2):  # in front of the compressor, and behind it
        _, model, x = made(name)
        expected = model.forward_intermediates(x, indices=[last], intermediates_only=True)
        model.prune_intermediate_layers([last])
        assert len(model.get_submodule(case.blocks)) == last + 1
        actual = model.forward_intermediates(x, indices=[last], intermediates_only=True)
        assert torch.equal(actual[0], expected[0])


@NAMES
@torch.no_grad()
def test_formats_of_intermediates(name):
    _, model, x = made(name)
    parameters = inspect.signature(model.forward_intermediates).parameters
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, maps, model.forward_intermediates(x)[1]))
    if "NLC" in inspect.getsource(type(model).body_class.forward_intermediates):
        flat = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        for y, tokens in zip(maps, flat, strict=True):
            assert torch.equal(y.flatten(2).transpose(1, 2), tokens)
    if "return_prefix_tokens" in parameters:
        pairs = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
        for y, pair in zip(maps, pairs, strict=True):
            assert torch.equal(y, pair[0] if isinstance(pair, tuple) else pair)
    if "output_dict" in parameters:
        found = model.forward_intermediates(x, output_dict=True)["image_intermediates"]
        assert all(torch.equal(a, b) for a, b in zip(maps, found, strict=True))
    if hasattr(model, "get_intermediate_layers"):
        last = model.get_intermediate_layers(x, n=1)
        assert last[0].shape[1] == maps[-1][0, 0].numel()
