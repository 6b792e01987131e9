# SPDX-License-Identifier: Apache-2.0
"""Views of one batch may be kept, merged once, or merged twice."""

import pytest
import torch
from families.vision_transformer import make
from hypothesis import given
from hypothesis import strategies as st

from uhd_ops import insert_early_compressor, window_mean
from uhd_ops.nn import (
    EarlyCompressor,
    SliceEncoder,
    choose_ratios,
    merge_by_ratio,
    token_variance,
)

GRIDS = [(4, 6), (3, 5), (1, 1), (2, 2)]
TOKENS, DIM = 44, 32


def compressor(**options):
    torch.manual_seed(0)
    return EarlyCompressor.from_block(make(**options).double().blocks[0])


def tokens():
    return torch.randn(TOKENS, DIM, dtype=torch.float64)


def split(x, grids):
    return x.split([h * w for h, w in grids])


@pytest.mark.parametrize("ratio", [1, 4, 16, 64])
@torch.no_grad()
def test_equal_ratios_are_the_uniform_result_bit_for_bit(ratio):
    module, x, grids = compressor(), tokens(), GRIDS
    merged, merged_grids = merge_by_ratio(module, x, grids, [ratio] * 4)
    while ratio > 1:
        x, grids = module(x, grids), [(-(-h // 2), -(-w // 2)) for h, w in grids]
        ratio //= 4
    assert torch.equal(merged, x)
    assert list(merged_grids) == grids


@torch.no_grad()
def test_each_view_is_what_it_would_be_alone():
    module, x, ratios = compressor(), tokens(), [16, 1, 4, 4]
    merged, grids = merge_by_ratio(module, x, GRIDS, ratios)
    assert list(grids) == [(1, 2), (3, 5), (1, 1), (1, 1)]
    views = zip(split(x, GRIDS), GRIDS, ratios, split(merged, grids), strict=True)
    for view, grid, ratio, actual in views:
        expected, _ = merge_by_ratio(module, view, [grid], [ratio])
        # Matrix products of another number of rows: sums of at most 4 * 4 * DIM terms, six in a
        # row for each merge.
        bound = 12 * 16 * DIM * torch.finfo(torch.float64).eps * expected.abs().max()
        assert (actual - expected).abs().max() <= bound
    assert torch.equal(split(merged, grids)[1], split(x, GRIDS)[1])


def test_gradients_flow_to_every_view():
    module, x = compressor(), tokens().requires_grad_()
    merged, _ = merge_by_ratio(module, x, GRIDS, [16, 1, 4, 4])
    merged.square().sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad.any() for parameter in module.parameters())


def encoder(**options):
    torch.manual_seed(0)
    return SliceEncoder(insert_early_compressor(make(reg_tokens=2, **options), 1))


VIEWS = [(16, 24), (12, 20), (28, 28)]  # px; patches of 4 px


@torch.no_grad()
def test_slice_encoder():
    model = encoder()
    views = [torch.randn(3, *size) for size in VIEWS]
    uniform, same = model(views), model(views, ratios=[4, 4, 4])
    assert torch.equal(uniform.tokens, same.tokens)
    assert torch.equal(uniform.prefix, same.prefix)
    assert uniform.grids == same.grids
    mixed = model(views, ratios=[1, 16, 4], views_per_image=[2, 1])
    assert list(mixed.grids) == [(4, 6), (1, 2), (4, 4)]
    assert [len(image) for image in mixed.per_image()] == [26, 16]
    for view, ratio, part, prefix in zip(
        views, [1, 16, 4], mixed.per_view(), mixed.prefix, strict=True
    ):
        alone = model([view], ratios=[ratio])
        # Float32: a dozen products of at most 4 * 4 * DIM terms behind one another in each block.
        bound = 4 * 12 * 16 * DIM * torch.finfo(torch.float32).eps * alone.tokens.abs().max()
        assert (part - alone.tokens).abs().max() <= bound
        assert (prefix - alone.prefix[0]).abs().max() <= bound


def test_slice_encoder_under_checkpointing():
    model, gradients = encoder().train(), []
    views = [torch.randn(3, *size) for size in VIEWS]
    for checkpointing in (False, True):
        model.vit.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(views, ratios=[1, 16, 4]).tokens.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


SCORES = st.lists(st.floats(0, 9, width=32), min_size=1, max_size=6)


@given(SCORES, st.data())
def test_chosen_ratios_keep_the_budget(scores, data):
    sides = st.tuples(st.integers(0, 9), st.integers(0, 9))
    grids = data.draw(st.lists(sides, min_size=len(scores), max_size=len(scores)))
    least = sum(-(-h // 4) * -(-w // 4) for h, w in grids)
    most = sum(h * w for h, w in grids)
    budget = data.draw(st.integers(max(least, 1), max(most, 1)))
    ratios = choose_ratios(scores, grids, budget)
    x = torch.randn(most, 2)
    merged, _ = merge_by_ratio(window_mean, x, grids, ratios)
    assert len(merged) <= budget
    # No view is merged further than one with a lower score.
    order = sorted(range(len(scores)), key=lambda view: (scores[view], view))
    assert [ratios[view] for view in order] == sorted(ratios, reverse=True)
    if most <= budget:
        assert set(ratios) == {1}


def test_flat_views_are_merged_first():
    x = torch.cat([torch.ones(16, 8), torch.randn(16, 8), torch.randn(16, 8) / 10])
    grids = [(4, 4)] * 3
    scores = token_variance(x, grids)
    assert scores[0] == 0
    assert scores[0] < scores[2] < scores[1]
    assert choose_ratios(scores, grids, 48) == [1, 1, 1]
    assert choose_ratios(scores, grids, 36) == [4, 1, 1]
    assert choose_ratios(scores, grids, 9) == [16, 4, 4]
    assert choose_ratios(scores, grids, 3) == [16, 16, 16]
    assert torch.equal(token_variance(x.view(48, 2, 2, 2), grids), scores)
    assert token_variance(x[:0], [(0, 3)]).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: merge_by_ratio(window_mean, x, GRIDS, [4] * 3), ValueError, "of 4 views, got 3"),
        (
            lambda x: merge_by_ratio(window_mean, x, GRIDS, [4, 4, 8, 1]),
            ValueError,
            r"ratios\[2\] must be a power of 4, got 8",
        ),
        (
            lambda x: merge_by_ratio(window_mean, x, GRIDS, [4, 4, True, 1]),
            TypeError,
            r"ratios\[2\] must be an int, got bool",
        ),
        (lambda x: merge_by_ratio(window_mean, x, GRIDS, 4), TypeError, "ratios must be a seq"),
        (lambda x: merge_by_ratio(window_mean, x[1:], GRIDS, [1] * 4), ValueError, "N = 44 tokens"),
        (lambda x: merge_by_ratio(window_mean, x[None], (4, 11), [1]), ValueError, "packed tokens"),
        (lambda x: choose_ratios([1.0], GRIDS, 9), ValueError, "scores must hold 4 numbers"),
        (lambda x: choose_ratios([float("nan")], [(2, 2)], 9), ValueError, "scores must hold 1"),
        (lambda x: choose_ratios([1] * 4, GRIDS, 1), ValueError, "max_tokens must be at least 6"),
        (lambda x: choose_ratios([1] * 4, GRIDS, 9, ratios=[4, 1]), ValueError, "ratios must asc"),
        (lambda x: encoder()([torch.zeros(3, 8, 8)], ratios=[2]), ValueError, "a power of 4"),
        (
            lambda x: SliceEncoder(make())([torch.zeros(3, 8, 8)], ratios=[4]),
            ValueError,
            "ratios need a vit with one compressor, got one with 0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(tokens())
