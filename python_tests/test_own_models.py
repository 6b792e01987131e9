# SPDX-License-Identifier: Apache-2.0
"""Models of classes that their users register: docs/own_vit.md, and what it promises of them."""

import copy
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from families.case import assert_close, merge_batch, mlp_mean, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import uhd_ops
from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.retrofit.registry import OWN

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own_vit.md"
ROUNDINGS = 12 * 512  # products of at most 4 * 128 terms, a dozen in a row


@pytest.fixture(scope="module")
def page():
    """The classes of the page, in a module of their own, so that they can be pickled."""
    module = types.ModuleType("own_vit_page")
    sys.modules[module.__name__] = module
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, PAGE.name, "exec"), vars(module))
    yield module
    for cls in (module.Tower, module.VisualTransformer):
        del OWN[cls]
    del sys.modules[module.__name__]


@pytest.fixture(params=["Tower", "VisualTransformer"])
def make(request, page):
    def make(**options):
        torch.manual_seed(0)
        return randomise(getattr(page, request.param)(**options)).double()

    return make


def images(size=40, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def tower_by_hand(vit, x, layer):
    side = x.shape[-1] // 8
    x = vit.embed(x).flatten(2).transpose(1, 2) + vit.positions
    for index, block in enumerate(vit.blocks):
        x = block(x)
        if index == layer:

            def attend(y, present, block=block):
                return block.attention(block.ln1(y)[None])[0]

            def mlp(z, block=block):
                def run(y):
                    hidden = nn.functional.gelu(block.fc1(y), approximate="tanh")
                    return block.fc2(hidden)

                return mlp_mean(block.ln2, run, z)

            x = merge_batch(x, (side, side), 0, 2, attend, mlp)
    return vit.norm(x)


def visual_by_hand(vit, x, layer):
    side = x.shape[-1] // 8
    patches = vit.conv1(x).flatten(2).transpose(1, 2)
    first = vit.class_embedding.expand(len(x), 1, -1)
    x = vit.ln_pre(torch.cat([first, patches], 1) + vit.positional_embedding)
    for index, block in enumerate(vit.transformer.resblocks):
        x = block(x.transpose(0, 1)).transpose(0, 1)
        if index == layer:

            def attend(y, present, block=block):
                y = block.ln_1(y)[:, None]
                return block.attn(y, y, y)[0][:, 0]

            def mlp(z, block=block):
                return mlp_mean(block.ln_2, block.mlp, z)

            x = merge_batch(x, (side, side), 1, 2, attend, mlp)
    return vit.ln_post(x[:, 0]) @ vit.proj, x[:, 1:]


BY_HAND = {"Tower": tower_by_hand, "VisualTransformer": visual_by_hand}


def outputs(vit, x):
    out = vit(x)
    return out if isinstance(out, tuple) else (out,)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("form", ["dense", "tied"])
def test_by_hand(make, layer, form):
    vit = make(size=40)
    name = type(vit).__name__
    expected = BY_HAND[name](vit, images(), layer)
    assert insert_early_compressor(vit, layer, form=form) is vit
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert_same(outputs(vit, images()), expected)


def test_removal(make):
    vit = make(size=40)
    before, cls = copy.deepcopy(vit.state_dict()), type(vit)
    with torch.no_grad():
        expected = outputs(vit, images())
        remove_early_compressor(insert_early_compressor(vit, 1))
        assert type(vit) is cls
        assert list(vit.state_dict()) == list(before)
        assert all(torch.equal(vit.state_dict()[name], value) for name, value in before.items())
        assert_same(outputs(vit, images()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit))])
def test_copies(make, copied):
    vit = insert_early_compressor(make(size=40), 1)
    other = copied(vit)
    assert type(other) is type(vit)
    assert other.compression == vit.compression
    with torch.no_grad():
        assert_same(outputs(other, images()), outputs(vit, images()))
    remove_early_compressor(other)
    assert hasattr(vit, "compression")


def test_a_pickle_needs_the_registration(make):
    vit = insert_early_compressor(make(), 1)
    cls, saved = type(vit).body_class, pickle.dumps(vit)
    family = OWN.pop(cls)
    try:
        with pytest.raises(ValueError, match=rf"own_vit_page\.{cls.__name__} must be registered"):
            pickle.loads(saved)
    finally:
        OWN[cls] = family


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_gradients(make, reentrant):
    vit = insert_early_compressor(make(size=40), 1)
    gradients = []
    for checkpointed in (False, True):
        vit.zero_grad()
        x = images().requires_grad_()
        if checkpointed:
            patches = checkpoint(lambda x: outputs(vit, x)[-1], x, use_reentrant=reentrant)
        else:
            patches = outputs(vit, x)[-1]
        patches.square().sum().backward()
        gradients.append({n: p.grad for n, p in vit.named_parameters() if p.grad is not None})
    names = {name for name, _ in vit.named_parameters() if ".compressor." in name}
    assert names <= gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert_close(gradients[1][name], grad, ROUNDINGS)


def test_compile(make):
    vit = insert_early_compressor(make(size=40), 1)
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(outputs(compiled, images()), outputs(vit, images()))


def test_several_merges_checkpoints_and_flops(make):
    plain = make(size=40)
    vit = uhd_ops.insert_progressive_compression(make(size=40), (0, 2))
    with torch.no_grad():
        assert outputs(vit, images())[-1].shape == (2, 4, 32)  # 5 x 5, 3 x 3, 2 x 2
    uhd_ops.remove_progressive_compression(vit)
    insert_early_compressor(vit, 1)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    uhd_ops.load_plain_checkpoint(vit, plain.state_dict())
    with torch.no_grad():
        assert_same(outputs(vit, images()), outputs(insert_early_compressor(plain, 1), images()))
    remove_early_compressor(vit)
    counts = [uhd_ops.flops.count_forward(vit, images(batch=1)).total]
    insert_early_compressor(vit, 0, form="tied")
    counts.append(uhd_ops.flops.count_forward(vit, images(batch=1)).total)
    assert 0 < counts[1] < counts[0]


def test_packed_views_are_refused(page):
    with pytest.raises(NotImplementedError, match="got the registered class Tower"):
        uhd_ops.nn.SliceEncoder(page.Tower())


def test_a_wrong_grid_is_refused(page, monkeypatch):
    vit = insert_early_compressor(page.VisualTransformer(), 1)
    wrong = staticmethod(lambda visual, image: (3, 3))
    monkeypatch.setattr(OWN[page.VisualTransformer].model, "_grid_of", wrong)
    with pytest.raises(ValueError, match="x must hold 1 prefix tokens and 3 x 3 patches"):
        vit(torch.randn(1, 3, 40, 40))


def test_refusals(page):
    known = {"blocks": "blocks", "read_block": page.read, "grid": page.grid}

    def refused(error, message, cls=page.Tower, **options):
        with pytest.raises(error, match=message):
            uhd_ops.register_family(cls, **{**known, **options})

    refused(TypeError, "cls must be a class of modules, got 3", 3)
    refused(TypeError, "blocks must be a dotted name, got int", blocks=3)
    refused(TypeError, "read_block must be callable, got NoneType", read_block=None)
    refused(TypeError, "grid must be callable, got tuple", grid=(5, 5))
    refused(TypeError, "prefix_tokens must be an int, got float", prefix_tokens=1.0)
    refused(ValueError, "prefix_tokens must be .*, got -1", prefix_tokens=-1)
    refused(ValueError, "layout must be", layout="BLC")
    refused(TypeError, "methods must be a sequence of names, got 'forward'", methods="forward")
    refused(ValueError, "methods must name methods of Tower, got 'encode'", methods=["encode"])
    timm = pytest.importorskip("timm")
    built_in = timm.models.VisionTransformer
    refused(ValueError, "cls must not be of a family that is known, got Vision", built_in)

    class Other(page.Tower):
        def forward(self, images):
            return super().forward(images) + 1

    with pytest.raises(NotImplementedError, match=r"leave Tower\.forward as it is, but Other"):
        insert_early_compressor(Other(), 1)
    vit = page.Tower()
    vit.blocks[1].fc1.weight = nn.Parameter(torch.randn(4, 32))
    with pytest.raises(NotImplementedError, match="shape"):
        insert_early_compressor(vit, 1)
    assert type(vit) is page.Tower

    class Unread(page.Tower):
        pass

    uhd_ops.register_family(Unread, **{**known, "read_block": lambda block: block})
    with pytest.raises(TypeError, match=r"read_block must return an nn\.BlockSpec, got Block"):
        insert_early_compressor(Unread(), 1)
    del OWN[Unread]
