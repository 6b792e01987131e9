# SPDX-License-Identifier: Apache-2.0
"""Every operator gives the numbers of its float64 definition, forward and backward, everywhere."""

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from battery import (
    GRIDDED,
    GRIDS,
    OPS,
    assert_close,
    assert_gradients_close,
    assert_same,
    assert_same_bits,
    expected,
    gradients,
    isas,
    make_call,
    not_exempt,
    per_case,
    per_op,
    public,
    run,
    using_isa,
)
from battery.calls import LAYOUTS, batched, random_like
from hypothesis import example, given
from specs import SPECS

from uhd_ops import PackedGrids
from uhd_ops._checks import FLOAT_DTYPES

DTYPES = pytest.mark.parametrize(
    "dtype", FLOAT_DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]
)


def check_against_definition(name, call, dtype, device, layouts=(torch.clone,), variants=None):
    spec = SPECS[name]
    exact_call = call.exact()
    grad_out = random_like(run(expected(name), exact_call)).to(dtype)
    exact_out, exact_grads = gradients(expected(name), exact_call, grad_out.double())
    there, grad_there = call.to(device), grad_out.to(device)
    for isa, layout in itertools.product(variants or isas(device)[-1:], layouts):
        where = f"{isa}, {layout.__name__}"
        with using_isa(isa):
            out, grads = gradients(public(name), there.map_tensors(layout), layout(grad_there))
        assert out.device.type == device, where
        assert out.dtype == dtype, where
        assert_close(spec, call, out, exact_out, f"{where}: result")
        assert_gradients_close(spec, call, grads, exact_grads, f"{where}: ")


@DTYPES
@per_case(cuda=OPS)
def test_equals_the_float64_definition(name, options, device, dtype):
    call = make_call(name, dtype, **options)
    check_against_definition(name, call, dtype, device, LAYOUTS, isas(device))


SIDES = st.integers(0, 7)
MANY_GRIDS = st.lists(
    st.one_of(
        st.tuples(SIDES, SIDES),
        st.tuples(st.just(1), st.integers(1, 11)),
        st.tuples(st.integers(1, 11), st.just(1)),
    ),
    max_size=5,
)


@example(grids=[], index=0, dtype=torch.float32)
@example(grids=[(0, 0)], index=0, dtype=torch.bfloat16)
@example(grids=[(1, 1)], index=1, dtype=torch.float32)
@example(grids=[(0, 3), (2, 2), (4, 0), (0, 0), (1, 5), (0, 1)], index=2, dtype=torch.float64)
@given(grids=MANY_GRIDS, index=st.integers(0, 1000), dtype=st.sampled_from(FLOAT_DTYPES))
@per_op(GRIDDED)
def test_any_grids(name, device, grids, index, dtype):
    # One value of every option, counted out of the index like the digits of a number.
    options = {}
    for option, values in SPECS[name].options.items():
        index, choice = divmod(index * 7 + 1, len(values))
        options[option] = values[choice]
    check_against_definition(name, make_call(name, dtype, grids, **options), dtype, device)


@pytest.mark.parametrize("batch", [0, 1, 3])
@per_case(GRIDDED)
def test_batched_form_equals_packed(name, options, device, batch):
    packed_call = make_call(name, grids=[GRIDS[1]] * batch, device=device, **options)
    batched_call = batched(packed_call, batch)
    out = run(public(name), packed_call)
    grad_out = random_like(out)
    batched_out = run(public(name), batched_call)
    assert batched_out.shape[0] == batch
    assert run(expected(name), batched_call).shape == batched_out.shape
    assert_same(name, "batch_invariance", packed_call, batched_out.flatten(0, 1), out)

    _, grads = gradients(public(name), packed_call, grad_out)
    _, batched_grads = gradients(public(name), batched_call, grad_out.view(batched_out.shape))
    for key, grad in grads.items():
        actual = batched_grads[key]
        assert actual.shape == batched_call.get(key).shape
        actual, what = actual.reshape(grad.shape), f"gradient of argument {key!r}"
        assert_same(name, "batch_invariance", packed_call, actual, grad, what)


FORMS = {
    "PackedGrids": PackedGrids,
    "tuple": lambda grids: tuple(map(tuple, grids)),
    "lists": lambda grids: [list(pair) for pair in grids],
    "numpy integers": lambda grids: [(np.int64(h), np.int32(w)) for h, w in grids],
    "tensor": torch.tensor,
    "int32 tensor": lambda grids: torch.tensor(grids, dtype=torch.int32),
    "array": np.array,
}


@pytest.mark.parametrize("form", FORMS)
@per_op(GRIDDED)
def test_every_form_of_grids(name, device, form):
    call = make_call(name, device=device)
    other = call.put(call.grids, FORMS[form](GRIDS))
    wanted_out, wanted_grads = gradients(public(name), call)
    out, grads = gradients(public(name), other)
    assert_same_bits(out, wanted_out)
    assert_same_bits(grads, wanted_grads, "gradient")
    call = make_call(name, grids=GRIDS[1:], device=device)
    wanted = run(public(name), call)
    assert_same_bits(run(public(name), call.put(call.grids, FORMS[form](GRIDS[1:]))), wanted)
    assert_same_bits(run(public(name), call.put(call.grids, GRIDS[1])), wanted, "bare pair")


@DTYPES
@per_case()
def test_large_values(name, options, device, dtype):
    # Thirty times larger tensors: scores that exp overflows on unless the largest is taken off. A
    # product of two tensors grows by 900, and so does the absolute error of an exponent.
    call = make_call(name, dtype, **options).map_tensors(lambda x: 30 * x)
    spec = replace(SPECS[name], roundings=lambda call: 900 * SPECS[name].roundings(call))
    exact = run(expected(name), call.exact())
    for isa in isas(device):
        with using_isa(isa):
            assert_close(spec, call, run(public(name), call.to(device)), exact, isa)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@per_case(not_exempt("non_finite", GRIDDED))
def test_non_finite_values_propagate_like_the_definition(name, options, device, value):
    call = make_call(name, **options)
    untouched = run(expected(name), call.exact())
    # A token of a full window, and the one in the corner of a ragged view.
    for position, token in itertools.product(call.per_token, (7, 38)):
        spoilt = call.get(position).clone()
        spoilt[token].view(-1)[-1] = value
        bad = call.put(position, spoilt)
        exact = run(expected(name), bad.exact())
        assert not torch.equal(exact, untouched)  # a logit of -inf leaves finite numbers
        for isa in isas(device):
            where = f"{isa}: {value} in token {token} of argument {position}"
            with using_isa(isa):
                out = run(public(name), bad.to(device)).cpu().double()
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(out), kind(exact)), f"{where}: {kind.__name__}"


@pytest.mark.parametrize("name", OPS)
def test_the_default_options_are_first(name):
    # The checks vary one option at a time from the defaults; they must start where a user starts.
    spec = SPECS[name]
    defaults = {option: values[0] for option, values in spec.options.items()}
    wanted = run(spec.reference, make_call(name, **defaults))
    assert_same_bits(run(spec.reference, make_call(name)), wanted)
