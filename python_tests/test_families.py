# SPDX-License-Identifier: Apache-2.0
"""Every family computes what its definition by hand says, on every way through the model."""

import copy

import hf_models
import pytest
import torch
from families import all_cases
from families.case import assert_close

from uhd_ops import insert_early_compressor
from uhd_ops.nn import EarlyCompressor

CASES = all_cases() | hf_models.all_cases()
LAYER = 1
VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
# Resized tables of scores keep offsets of one token, rounded to float32.
RESIZED_ROUNDINGS = 12 * 512 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
RESIZABLE = [
    ("VisionTransformer", "odd"),
    ("Eva, rotary", "axial"),
    ("Beit", "shared bias, absolute"),
    ("VisionTransformerRelPos", "table, class token"),
    ("VisionTransformerRelPos", "mlp"),
    ("VisionTransformerRelPos", "table, shared"),
]


@torch.no_grad()
def compare(case, model, plain, x, roundings=None, **options):
    """Compare features and all maps of a compressed model with the definition of the plain one."""
    roundings = roundings or case.roundings
    outs, features = case.by_hand(plain, x, **options)
    assert_close(case.run(model, x), features, roundings)
    for actual, out in zip(case.patches(model, x), outs, strict=True):
        assert_close(actual, out[:, case.num_prefix(model) :], roundings)


def check(name, variant=None, batch=2, **options):
    case = CASES[name]
    model = case.exact(case.make_first() if variant is None else case.make_variant(variant))
    plain = copy.deepcopy(model)
    insert_early_compressor(model, **options)
    compare(case, model, plain, case.images(model, batch, torch.float64), **options)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_definition(name, variant):
    check(name, variant, layer=LAYER)


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 0},
        {"layer": 3},
        {"layer": 2, "attention": False},
        {"layer": 1, "window": 3},
        {"layer": 1, "window": 8},
        {"layer": 1, "positions": "reindex"},
        {"layer": 1, "positions": "reindex", "window": 3, "attention": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_options(name, options):
    check(name, batch=1, **options)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sizes])
def test_the_grid_is_read_at_every_call(name):
    case = CASES[name]
    plain = case.exact(case.make_first())
    model = insert_early_compressor(copy.deepcopy(plain), LAYER)
    for size in case.sizes:
        compare(case, model, plain, case.images(model, 2, torch.float64, size), layer=LAYER)


@pytest.mark.parametrize("size", [(20, 36), (44, 32)])
@pytest.mark.parametrize(("name", "variant"), RESIZABLE, ids=str)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
def test_set_input_size_after_insertion(name, variant, size):
    case = CASES[name]
    plain = case.make_variant(variant).double()
    model = insert_early_compressor(copy.deepcopy(plain), LAYER)
    keys = list(model.state_dict())
    for vit in (model, plain):
        vit.set_input_size(img_size=size)
    assert list(model.state_dict()) == keys
    x = case.images(model, 2, torch.float64)
    compare(case, model, plain, x, RESIZED_ROUNDINGS, layer=LAYER)


@pytest.mark.parametrize("form", ["block", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_forms_start_as_the_same_function(name, form):
    case = CASES[name]
    plain = case.exact(case.make_first())
    model = insert_early_compressor(copy.deepcopy(plain), LAYER, form=form)
    x = case.images(model, 2, torch.float64)
    compare(case, model, plain, x, layer=LAYER)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
@torch.no_grad()
def test_equal_tokens_become_what_the_block_makes_of_them(name, variant):
    case = CASES[name]
    model = case.make_variant(variant).double()
    compressor = EarlyCompressor.from_block(model.get_submodule(case.blocks)[LAYER])
    outs, _ = case.by_hand(model, case.images(model, 1, torch.float64), layer=LAYER)
    tokens, channels = outs[0].shape[1:]
    x = torch.randn(1, 1, channels, dtype=torch.float64).expand(1, tokens, channels)
    expected = case.run_block(model, LAYER, x)[0, :1]
    assert_close(compressor(x[0, :4], [(2, 2)]), expected, case.roundings)
    assert_close(compressor(x[0, :1], [(1, 1)]), expected, case.roundings)
