# SPDX-License-Identifier: Apache-2.0
"""Vision models of transformers with a compressor compute what a loop over windows computes."""

import copy
import inspect
import pickle

import pytest
import torch
from families.case import assert_close
from hf_models import CASES, ROUNDINGS, random_images

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.nn import EarlyCompressor


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def compare(case, images, layer=1, call=None, **options):
    model = case.make_exact()
    expected = case.by_hand(case.vit(model), images, layer, **options)
    insert_early_compressor(model, layer, **options)
    output = model(images, output_hidden_states=True, **(call or {}))
    for actual, state in zip(output.hidden_states, expected, strict=True):
        assert_close(actual, state, ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hidden_states(case, layer):
    compare(case, random_images(), layer)


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("positions", ["center", "reindex"])
def test_options(case, window, positions, attention):
    compare(case, random_images(), window=window, positions=positions, attention=attention)


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 40), (32, 20), (8, 16)])
def test_sizes(case, size):
    compare(case, random_images(*size), call=case.resizes)


@torch.no_grad()
def test_pooled_outputs(case):
    model = case.make_exact()
    states = case.by_hand(case.vit(model), images := random_images())
    insert_early_compressor(model, 1)
    output = model(images)
    vit, last = case.vit(model), states[-1]
    if "Siglip" in case.model:
        pooled = vit.head(vit.post_layernorm(last)) if vit.use_head else None
    elif "CLIP" in case.model:
        pooled = vit.post_layernorm(last[:, 0])
    else:
        norm = vit.norm if "DINOv3" in case.model else vit.layernorm
        pooled = norm(last)[:, 0]
    if case.trunk == "vision_model":
        assert_close(output.image_embeds, model.visual_projection(pooled), ROUNDINGS)
    elif case.trunk == "dinov2":
        normed = vit.layernorm(last)
        logits = model.classifier(torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1))
        assert_close(output.logits, logits, ROUNDINGS)
    elif pooled is None:
        assert output.pooler_output is None
    else:
        assert_close(output.pooler_output, pooled, ROUNDINGS)


@torch.no_grad()
def test_equal_tokens(case):
    # A window of equal tokens comes out as the layer maps that token.
    model = case.make().double()
    layer = case.vit(model).get_submodule(case.layers)[1]
    tokens = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, 4, 32).contiguous()
    positions = {}
    if "DINOv3" in case.model:
        angles = torch.zeros(4, 16, dtype=torch.float64)
        positions["position_embeddings"] = angles.cos(), angles.sin()
    expected = layer(tokens, None, **positions)[:, :1]
    assert_close(EarlyCompressor.from_block(layer)(tokens, (2, 2)), expected, ROUNDINGS)


def test_attentions_and_tuples(case):
    model = case.make(attn_implementation="eager")
    insert_early_compressor(model, 1)
    prefix = {"CLIP": 1, "Sigl": 0, "Dino": 1, "DINO": 1}[case.model[:4]]
    prefix += getattr(case.vit(model).config, "num_register_tokens", 0)
    images = random_images(dtype=torch.float32)
    with torch.no_grad():
        output = model(images, output_attentions=True)
        lengths = [49 + prefix] * 2 + [16 + prefix] * 2
        assert [a.shape[-2:] for a in output.attentions] == [(n, n) for n in lengths]
        values = model(images, return_dict=False)
    kept = [value for name, value in output.items() if name != "attentions"]
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True))


def test_class_stays_the_same_for_transformers(case):
    model = case.make()
    before = [str(type(m)) for m in model.modules()]
    signature = inspect.signature(model.forward).parameters
    insert_early_compressor(model, 1)
    vit = case.vit(model)
    added = {m for m in vit.get_submodule(case.layers)[1].compressor.modules()}
    assert [str(type(m)) for m in model.modules() if m not in added] == before
    layers = vit.get_submodule(case.layers)
    assert {type(layer).__name__ for layer in layers} <= set(vit._no_split_modules)
    assert list(inspect.signature(model.forward).parameters) == list(signature)
    assert "compression=" in repr(model)


def test_removal_restores_everything(case):
    model = case.make()
    images = random_images(dtype=torch.float32)
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    config, weights = model.config.to_dict(), copy.deepcopy(model.state_dict())
    expected = model(images)
    insert_early_compressor(model, 1)
    assert set(weights) < set(model.state_dict())
    model(images)
    assert remove_early_compressor(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, expected[name]) for name, value in model(images).items())


def test_twice(case):
    model = insert_early_compressor(case.make(), 1)
    compressor = case.vit(model).get_submodule(case.layers)[1].compressor
    insert_early_compressor(model, 1)
    assert case.vit(model).get_submodule(case.layers)[1].compressor is compressor
    with pytest.raises(ValueError, match="vit holds a compressor already"):
        insert_early_compressor(model, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(case, copied):
    model = insert_early_compressor(case.make(), 1)
    other = copied(model)
    images = random_images(dtype=torch.float32)
    with torch.no_grad():
        expected = model(images)[0]
        assert torch.equal(other(images)[0], expected)
        for name, parameter in model.named_parameters():
            if "compressor" in name:
                parameter.zero_()
        assert torch.equal(other(images)[0], expected)
        assert not torch.equal(model(images)[0], expected)
    remove_early_compressor(other)
    assert type(other) is case.cls


def test_gradients_and_checkpointing(case):
    torch.manual_seed(0)
    model = insert_early_compressor(case.make(), 1).train()
    images = random_images(dtype=torch.float32)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)  # DINOv3 draws its coordinates
        model(images)[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    names = {name for name, _ in model.named_parameters() if "compressor" in name}
    assert names
    assert names <= gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.zero_grad()
    torch.manual_seed(1)
    model(images.requires_grad_())[0].square().sum().backward()
    for name, grad in gradients[0].items():
        actual = model.get_parameter(name).grad
        if "patch_embedding" in name:
            # Reentrant recomputing gives the first layer's input a gradient with the input's own
            # strides, and torch's convolution adds in another order over those.
            assert_close(actual, grad, ROUNDINGS)
        else:
            assert torch.equal(actual, grad), name


def test_bfloat16(case):
    # The reuse initialisation rounds nothing, so it does not matter when the dtype changes.
    first, second = case.make(), case.make()
    second.load_state_dict(first.state_dict())
    insert_early_compressor(first.bfloat16(), 1)
    insert_early_compressor(second, 1).bfloat16()
    images = random_images(dtype=torch.bfloat16)
    with torch.no_grad():
        outputs = [model(images)[0] for model in (first, second)]
    assert outputs[0].dtype == torch.bfloat16
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def test_meta_device(case):
    model = insert_early_compressor(case.make().to("meta"), 1)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["SigLIP", "DINOv2 with registers", "DINOv3"])
def test_compile(name):
    model = insert_early_compressor(CASES[name].make(), 1)
    images = random_images(dtype=torch.float32)
    with torch.no_grad():
        expected = model(images, output_hidden_states=True)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        output = compiled(images, output_hidden_states=True)
    for actual, state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(actual, state)
