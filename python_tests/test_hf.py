# SPDX-License-Identifier: Apache-2.0
"""Vision models of transformers with a compressor: what test_families*.py do not ask of them."""

import inspect

import pytest
import torch
from families.case import assert_close
from hf_models import CASES, ROUNDINGS, random_images

from uhd_ops import insert_early_compressor, remove_early_compressor


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@torch.no_grad()
def test_pooled_outputs(case):
    model = case.exact(case.make())
    states = case.by_hand(case.vit(model), images := random_images())
    expected = case.outputs_of(model, states[-1])
    output = insert_early_compressor(model, 1)(images, return_dict=False)
    for actual, wanted in zip(output, expected, strict=False):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert_close(actual, wanted, ROUNDINGS)


def test_attentions_and_tuples(case):
    model = case.make(attn_implementation="eager")
    insert_early_compressor(model, 1)
    prefix = int(case.model.startswith(("CLIP", "Dino", "DINO", "InternVL", "Blip")))
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
    splittable = {"Idefics2EncoderLayer", "SmolVLMEncoderLayer"}  # says transformers
    assert {type(layer).__name__ for layer in layers} <= {*vit._no_split_modules, *splittable}
    assert list(inspect.signature(model.forward).parameters) == list(signature)
    assert "compression=" in repr(model)


def test_removal_restores_config_and_outputs(case):
    model = case.make()
    images = random_images(dtype=torch.float32)
    config, expected = model.config.to_dict(), model(images)
    remove_early_compressor(insert_early_compressor(model, 1))
    assert model.config.to_dict() == config
    assert all(torch.equal(value, expected[name]) for name, value in model(images).items())


def test_reentrant_checkpointing(case):
    model = insert_early_compressor(case.make(), 1).train()
    images = random_images(dtype=torch.float32).requires_grad_()
    gradients = []
    for options in (None, {"use_reentrant": True}):
        if options:
            model.activation_checkpointing_enable(options)
        model.zero_grad()
        torch.manual_seed(1)  # DINOv3 draws its coordinates
        model(images)[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        if "patch_embed" in name or "embeddings.rms_norm" in name:
            # Reentrant recomputing gives the first layer's input a gradient with the input's own
            # strides, and torch's convolution and sums add in another order over those.
            assert_close(gradients[1][name], grad, ROUNDINGS)
        else:
            assert torch.equal(gradients[1][name], grad), name
