# SPDX-License-Identifier: Apache-2.0
"""Every family computes what its definition by hand says, on every way through the model."""

import pytest
import torch
from families import all_cases
from families.case import assert_close

from uhd_ops import insert_early_compressor
from uhd_ops.nn import EarlyCompressor

CASES = all_cases()
LAYER = 1
VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
RESIZED = [(name, size) for name, case in CASES.items() for size in case.sizes]


def first(case):
    return next(iter(case.variants.values()))


def features_of(result):
    """The tokens that ``forward_features`` returned; NaFlex models return them in a dictionary."""
    return result["patches"] if isinstance(result, dict) else result


def check(case, model, x, **options):
    """Compare a compressed model with the definition, features and all maps."""
    with torch.no_grad():
        outs, features = case.by_hand(model, x, **options)
        prefix = case.num_prefix(model)
        insert_early_compressor(model, **options)
        assert_close(features_of(model.forward_features(x)), features_of(features), case.roundings)
        if isinstance(x, dict):  # padded batches, whose maps test_naflexvit.py compares
            return
        _, maps = model.forward_intermediates(x)
    for actual, out in zip(maps, outs, strict=True):
        assert actual.dim() == 4
        assert_close(actual.flatten(2).transpose(1, 2), out[:, prefix:], case.roundings)
    fine, coarse = maps[0].shape[2:], maps[-1].shape[2:]
    window = options.get("window", 2)
    if options["layer"] > 0:
        assert tuple(coarse) == tuple(-(-side // window) for side in fine)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_definition(name, variant):
    case = CASES[name]
    model = case.make(**case.variants[variant]).double()
    check(case, model, case.images(model, 2, torch.float64), layer=LAYER)


@pytest.mark.parametrize(("name", "size"), RESIZED, ids=str)
def test_sizes(name, size):
    case = CASES[name]
    model = case.make(**first(case)).double()
    check(case, model, case.images(model, 2, torch.float64, size), layer=LAYER)


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 0},
        {"layer": 3},
        {"layer": 2, "attention": False},
        {"layer": 1, "window": 3},
        {"layer": 1, "window": 8},
        {"layer": 1, "positions": "reindex"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_options(name, options):
    case = CASES[name]
    model = case.make(**first(case)).double()
    check(case, model, case.images(model, 1, torch.float64), **options)


@pytest.mark.parametrize("form", ["block", "tied"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_forms_start_as_the_same_function(name, form):
    case = CASES[name]
    model = case.make(**first(case)).double()
    x = case.images(model, 2, torch.float64)
    _, expected = case.by_hand(model, x, layer=LAYER)
    actual = insert_early_compressor(model, LAYER, form=form).forward_features(x)
    assert_close(features_of(actual), features_of(expected), case.roundings)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
@torch.no_grad()
def test_equal_tokens_become_what_the_block_makes_of_them(name, variant):
    case = CASES[name]
    model = case.make(**case.variants[variant]).double()
    block = model.get_submodule(case.blocks)[LAYER]
    compressor = EarlyCompressor.from_block(block)
    outs, _ = case.by_hand(model, case.images(model, 1, torch.float64), layer=LAYER)
    tokens, channels = outs[0].shape[1:]
    x = torch.randn(1, 1, channels, dtype=torch.float64).expand(1, tokens, channels)
    expected = case.run_block(model, LAYER, x)[0, :1]
    assert_close(compressor(x[0, :4], [(2, 2)]), expected, case.roundings)
    assert_close(compressor(x[0, :1], [(1, 1)]), expected, case.roundings)
