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
from battery import TWELVE
from families.case import assert_close, merge_batch, mlp_mean, randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
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


GRIDS = ((5, 5), (3, 4), (1, 1), (3, 4))


def alone(page, vit, view):
    """What the model itself makes of a view, with the positions that the page gives to its grid."""
    vit, grid = copy.deepcopy(vit), (view.shape[1] // 8, view.shape[2] // 8)
    if hasattr(vit, "positions"):
        vit.positions = nn.Parameter(page.resized(vit.positions[0], grid)[None])
    else:
        first, table = vit.positional_embedding[:1], vit.positional_embedding[1:]
        vit.positional_embedding = nn.Parameter(torch.cat([first, page.resized(table, grid)]))
    return [x[0] for x in outputs(vit, view[None])]


@torch.no_grad()
@pytest.mark.parametrize("layers", [(), (1,), (0, 2)])
def test_packed_views(page, make, layers):
    vit = make(size=40)
    if layers:
        uhd_ops.insert_progressive_compression(vit, layers)
    views = [torch.randn(3, 8 * h, 8 * w, dtype=torch.float64) for h, w in GRIDS]
    result = uhd_ops.nn.SliceEncoder(vit)(views)
    assert result.grids == uhd_ops.PackedGrids(GRIDS).merged(2 ** len(layers))
    for view, tokens, prefix in zip(views, result.per_view(), result.prefix, strict=True):
        *pooled, expected = alone(page, vit, view)
        for actual, wanted in ((tokens, expected), *zip(prefix, pooled, strict=True)):
            assert actual.shape == wanted.shape
            assert (actual - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_packed_views_in_a_graph(page, monkeypatch):
    def embed(visual, patches, grids):
        _, tokens = page.embed_views(visual, patches, grids)
        return visual.class_embedding.expand(len(grids), 1, -1), tokens  # a view of a parameter

    monkeypatch.setattr(OWN[page.VisualTransformer].packed, "_embed", staticmethod(embed))
    vit = randomise(page.VisualTransformer(depth=1)).double()
    encoder = uhd_ops.nn.SliceEncoder(vit)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for pairs in TWELVE:
        grids, gradients = uhd_ops.PackedGrids(pairs), []
        patches = torch.randn(grids.num_tokens, 3, 8, 8, dtype=torch.float64)
        for encode in (compiled, encoder):
            encoder.zero_grad()
            result = encode(patches, grids)
            (result.tokens.square().sum() + result.prefix.square().sum()).backward()
            gradients.append([p.grad for p in encoder.parameters()])
        for actual, expected in zip(*gradients, strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1)
    assert backend.frame_count <= 3
    torch._dynamo.reset()


def test_what_packed_views_need(page, monkeypatch):
    class Bare(page.Tower):
        pass

    known = {"blocks": "blocks", "read_block": page.read, "grid": page.grid}
    uhd_ops.register_family(Bare, **known)
    with pytest.raises(
        NotImplementedError, match=r"how Bare embeds .* with patch_shape=\.\.\. and"
    ):
        uhd_ops.nn.SliceEncoder(Bare())
    del OWN[Bare]
    encoder = uhd_ops.nn.SliceEncoder(page.Tower())
    packed = OWN[page.Tower].packed

    def refused(error, message, **instead):
        with monkeypatch.context() as patch:
            for name, function in instead.items():
                patch.setattr(packed, name, staticmethod(function))
            with pytest.raises(error, match=message):
                uhd_ops.nn.SliceEncoder(page.Tower())([torch.randn(3, 16, 24)])

    refused(
        ValueError, r"must return \(channels, height, width\), got 8", _patch_shape=lambda vit: 8
    )
    tokens = torch.zeros(6, 32)
    shape = r"tokens of shape \(6, C\) .* got shape \(5, 32\)"
    refused(ValueError, shape, _embed=lambda vit, patches, grids: (None, tokens[1:]))
    shape = r"prefix of shape \(1, 0, C\) .* prefix_tokens = 0, got shape \(1, 2, 32\)"
    refused(ValueError, shape, _embed=lambda vit, patches, grids: (tokens[None, :2], tokens))
    message = "must return a tensor as tokens, got NoneType"
    refused(TypeError, message, _embed=lambda vit, patches, grids: (tokens, None))
    with pytest.raises(ValueError, match="positions must be"):
        uhd_ops.nn.SliceEncoder(encoder.vit, "nearest")


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
    refused(TypeError, "embed must be callable, got int", embed=3)
    refused(ValueError, "given together, and with finish, got embed alone", embed=page.embed)
    refused(ValueError, "together, and with finish, got finish alone", finish=page.finish)
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

    class Elsewhere(page.Tower):
        pass

    wrong = "ModuleList or Sequential in Elsewhere, which has 'blocks'; got {}, which is {} there"
    for name, what in (("encoder.layers", "nothing"), ("norm", "a LayerNorm")):
        uhd_ops.register_family(Elsewhere, **{**known, "blocks": name})
        with pytest.raises(ValueError, match=wrong.format(repr(name), what)):
            insert_early_compressor(Elsewhere(), 1)
        with pytest.raises(ValueError, match=wrong.format(repr(name), what)):
            uhd_ops.nn.SliceEncoder(Elsewhere())
    del OWN[Elsewhere]

    class Unread(page.Tower):
        pass

    uhd_ops.register_family(Unread, **{**known, "read_block": lambda block: block})
    with pytest.raises(TypeError, match=r"read_block must return an nn\.BlockSpec, got Block"):
        insert_early_compressor(Unread(), 1)
    del OWN[Unread]
