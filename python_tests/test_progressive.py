# SPDX-License-Identifier: Apache-2.0
"""insert_progressive_compression: several merges in one model, of any family."""

import copy
import pickle

import hf_models
import pytest
import torch
from families import all_cases
from families.case import assert_close, snapshot, window_slots
from families.vision_transformer import make
from torch.nn import functional

from uhd_ops import (
    PackedGrids,
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
    remove_progressive_compression,
)
from uhd_ops.nn import SliceEncoder

# Gemma 4's pooler wants sides that are multiples of three behind all merges.
CASES = {
    name: case
    for name, case in all_cases().items()
    if case.make.__module__.startswith("families.") and not name.startswith(("Gemma4", "Hf"))
} | hf_models.all_cases()
NAMES = pytest.mark.parametrize("name", CASES)
LAYERS = (0, 2)


def pool_by_hand(module, x, grid):
    """Content-adaptive pooling of one view, window by window."""
    merged = []
    for present, _ in window_slots(*grid):
        rows = x[present]
        both = torch.cat([rows, rows.mean(0).expand_as(rows)], 1)
        logits = module.fc2(functional.gelu(module.fc1(both)))
        merged.append((logits.softmax(0) * rows).sum(0))
    return torch.stack(merged)


def by_hand(model, compressors, x, grid):
    """A VisionTransformer with merges, block by block; returns all outputs."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    prefix, outs = model.num_prefix_tokens, []
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        if index in compressors:
            parts = [pool_by_hand(compressors[index], y, grid) for y in tokens[:, prefix:]]
            tokens = torch.cat([tokens[:, :prefix], torch.stack(parts)], 1)
            grid = [-(-side // 2) for side in grid]
        outs.append(tokens)
    return outs


@pytest.mark.parametrize("size", [28, 32, 20, 8])
@torch.no_grad()
def test_definition(size):
    model = make(img_size=size, reg_tokens=2).double()
    plain = copy.deepcopy(model)
    insert_progressive_compression(model, LAYERS)
    compressors = {index: model.blocks[index].compressor for index in (0, 2)}
    for module in compressors.values():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    outs = by_hand(plain, compressors, x, (size // 4, size // 4))
    # Products of at most 4 * 4 * 32 terms, two dozen in a row.
    assert_close(model.forward_features(x), plain.norm(outs[-1]), 24 * 512)
    _, maps = model.forward_intermediates(x)
    for actual, out in zip(maps, outs, strict=True):
        assert_close(actual.flatten(2).transpose(1, 2), out[:, 3:], 24 * 512)
    sides = [-(-size // 4 // n) for n in (2, 2, 4, 4)]
    assert [tuple(y.shape[2:]) for y in maps] == [(side, side) for side in sides]
    assert [info["reduction"] for info in model.feature_info] == [8, 8, 16, 16]
    assert remove_progressive_compression(model).feature_info == plain.feature_info


@NAMES
@torch.no_grad()
def test_starts_as_pooling(name):
    case = CASES[name]
    model = case.make_first()
    x = case.images(model, 2, torch.float32)
    other = insert_early_compressor(copy.deepcopy(model), 1, attention="none", mlp="none")
    expected = case.run(other, x)
    actual = case.run(insert_progressive_compression(model, [1], pool="mean"), x)
    assert torch.equal(actual, expected)
    adaptive = insert_progressive_compression(remove_progressive_compression(model), [1])
    # A softmax of equal scores is a mean, up to rounding in each of four blocks.
    bound = 4 * 12 * 512 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (case.run(adaptive, x) - expected).abs().max() <= bound


@NAMES
@pytest.mark.parametrize("positions", ["center", "reindex"])
def test_every_family(name, positions):
    case = CASES[name]
    model = case.make_first()
    x = case.images(model, 2, torch.float32)
    before = snapshot(model)
    with torch.no_grad():
        expected = case.run(model, x)
    inserted = insert_progressive_compression(model, LAYERS, positions=positions)
    assert inserted is model
    assert insert_progressive_compression(model, LAYERS, positions=positions) is model
    out = case.run(model, x)
    assert out.isfinite().all()
    out.square().sum().backward()
    compressors = [p for key, p in model.named_parameters() if ".compressor." in key]
    assert compressors
    # The last linear starts at zero, so the first learns nothing before the first step.
    assert all(p.grad is not None for p in compressors)
    assert sum(bool(p.grad.any()) for p in compressors) >= 2
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(clone, x), out)
    remove_progressive_compression(model)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(case.run(model, x), expected)


@NAMES
@torch.no_grad()
def test_positions_of_two_merges_are_those_of_one_large_window(name):
    # Two merges in a row leave each token where one merge of 4 x 4 windows would have left it.
    case = CASES[name]
    model = case.make_first().double()
    x = case.images(model, 1, torch.float64)
    once = insert_progressive_compression(copy.deepcopy(model), [1], pool="mean", window=4)
    expected = case.run(once, x)
    twice = insert_progressive_compression(model, [0, 1], pool="mean")
    assert case.run(twice, x).shape == expected.shape


def test_slice_encoder_runs_all_merges():
    torch.manual_seed(0)
    encoder = SliceEncoder(insert_progressive_compression(make(), LAYERS))
    views = [torch.randn(3, 16, 24), torch.randn(3, 12, 20)]
    result = encoder(views)
    assert result.grids == PackedGrids([(1, 2), (1, 2)])
    vit = encoder.vit
    vit.patch_embed.strict_img_size = False
    assert result.tokens.shape == (4, 32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": ()}, ValueError, "layers must ascend, with at least one"),
        ({"layers": (2, 2)}, ValueError, "layers must ascend, with at least one"),
        ({"layers": (2, 4)}, ValueError, r"layers must be in 0\.\.3 for a model of 4 blocks"),
        ({"layers": (-1,)}, ValueError, r"layers\[0\] must be at least 0, got -1"),
        ({"layers": 4}, TypeError, "layers must be a sequence of ints, got int"),
        ({"layers": (0,), "pool": "max"}, ValueError, "pool must be"),
        ({"layers": (0,), "window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"layers": (0,), "positions": "x"}, ValueError, 'positions must be "center" or'),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        insert_progressive_compression(model, **arguments)
    assert snapshot(model) == before


def test_the_two_kinds_of_insertion_do_not_mix():
    early, progressive = insert_early_compressor(make(), 1), make()
    insert_progressive_compression(progressive, (1,))
    with pytest.raises(ValueError, match=r"call remove_early_compressor\(vit\) before"):
        insert_progressive_compression(early, (1,))
    with pytest.raises(ValueError, match=r"call remove_progressive_compression\(vit\) before"):
        insert_early_compressor(progressive, 1)
    with pytest.raises(ValueError, match="vit holds no progressive compression"):
        remove_progressive_compression(early)
    with pytest.raises(ValueError, match=r"call remove_progressive_compression\(vit\) to remove"):
        remove_early_compressor(progressive)


@pytest.mark.parametrize("name", ["VisionTransformer", "Eva, rotary", "Beit", "Cait"])
@torch.no_grad()
def test_compile(name):
    case = CASES[name]
    model = insert_progressive_compression(case.make_first(), LAYERS)
    x = case.images(model, 2, torch.float32)
    expected = case.run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(case.run(model, x), expected)
