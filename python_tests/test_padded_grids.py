# SPDX-License-Identifier: Apache-2.0
"""PaddedGrids: the same numbers as PackedGrids, zeros beyond them, at sizes that never change."""

import copy
import re
import threading

import pytest
import torch
from battery import GRIDDED, assert_same_bits, gradients, make_call, public, run
from battery.calls import random_like
from battery.marks import native_only
from hypothesis import given
from hypothesis import strategies as st
from specs._spec import ORDERS

import uhd_ops
from uhd_ops import PackedGrids, PaddedGrids

MAX_TOKENS, MAX_VIEWS = 60, 5
BATCHES = [[(4, 6), (3, 5)], [(1, 1)], [(0, 3), (6, 9), (1, 2), (2, 2)], []]
PADDED_OPS = [name for name in GRIDDED if name != "view_attention"]
PRODUCTS = {"pixel_unshuffle_mlp"}  # torch's GEMM may round differently with more rows

pytestmark = native_only("the definitions know no capacities")


def padded_grids(side=2):
    return PaddedGrids(MAX_TOKENS, MAX_VIEWS, windows=(side,), device="cpu")


def with_padding(call, grids):
    """Return the call with as many rows as the capacity, NaN in those that nothing may read."""
    for position in call.per_token:
        x = call.get(position)
        rows = x.new_full((MAX_TOKENS, *x.shape[1:]), float("nan"))
        rows[: len(x)] = x
        call = call.put(position, rows)
    return call.put(call.grids, grids)


def assert_equal(name, actual, wanted):
    if name in PRODUCTS:
        torch.testing.assert_close(actual, wanted)
    else:
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("order_in", ORDERS, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", PADDED_OPS)
def test_padding_changes_nothing(name, batch, order_in):
    call = make_call(name, torch.float32, batch, order_in=order_in)
    side = call.kwargs.get("window", call.kwargs.get("factor", 2))
    grids = padded_grids(side)
    grids.update(batch)
    wanted, wanted_grads = gradients(public(name), call)
    padded_call = with_padding(call, grids)
    out = run(public(name), padded_call)
    rows = len(wanted)
    grad_out = torch.full_like(out, float("nan"))  # of padding, which nothing may read
    grad_out[:rows] = random_like(wanted)  # the numbers that `gradients` chose above
    out, grads = gradients(public(name), padded_call, grad_out)
    assert_equal(name, out[:rows], wanted)
    assert not out[rows:].any()
    for key, wanted_grad in wanted_grads.items():
        count = len(wanted_grad) if key in call.per_token else len(grads[key])
        assert_equal(name, grads[key][:count], wanted_grad)
        assert not grads[key][count:].any()


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=MAX_VIEWS).filter(
            lambda pairs: sum(h * w for h, w in pairs) <= MAX_TOKENS
        ),
        min_size=1,
        max_size=4,
    )
)
def test_updates_follow_each_other(batches):
    grids = padded_grids()
    x = torch.randn(MAX_TOKENS, 8)
    for batch in batches:
        grids.update(batch)
        wanted = uhd_ops.window_mean(x[: PackedGrids(batch).num_tokens], batch)
        out = uhd_ops.window_mean(x, grids)
        assert out.shape == (MAX_TOKENS, 8)
        assert_same_bits(out[: len(wanted)], wanted)
        assert not out[len(wanted) :].any()


def test_merged_grids_follow():
    grids = PaddedGrids(64, 3, windows={2: 16}, device="cpu")
    merged = grids.merged(2)
    grids.update([(4, 6), (2, 4)])
    assert merged.num_tokens == 16
    assert list(merged.current) == [(2, 3), (1, 2)]
    assert merged.cu_seqlens.tolist() == [0, 6, 8, 8]
    assert grids.merged(2) is merged
    assert grids.cu_seqlens.tolist() == [0, 24, 32, 32]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([(8, 8)], "grids hold 64 tokens, more than max_tokens = 60"),
        ([(1, 1)] * 6, "grids hold 6 views, more than max_views = 5"),
        ([(1, 20)], "grids hold 10 windows of side 2, more than windows[2] = 8"),
    ],
)
def test_what_does_not_fit_changes_nothing(batch, message):
    grids = PaddedGrids(60, 5, windows={2: 8}, device="cpu")
    grids.update([(4, 6)])
    before = grids.view_table(2, torch.device("cpu")).clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        grids.update(batch)
    assert torch.equal(grids.view_table(2, torch.device("cpu")), before)
    assert list(grids.current) == [(4, 6)]


def test_refusals():
    x, grids = torch.randn(MAX_TOKENS, 8), padded_grids()
    with pytest.raises(ValueError, match=r"x must be \(N, C\) with N = 60 tokens \(max_tokens of"):
        uhd_ops.window_mean(x[:-1], grids)
    with pytest.raises(ValueError, match=r"window must be one of \[2\], the sides that these"):
        uhd_ops.window_mean(x, grids, window=3)
    with pytest.raises(
        NotImplementedError, match="grids of view_attention must not be PaddedGrids"
    ):
        uhd_ops.view_attention(*(x.view(MAX_TOKENS, 1, 8),) * 3, grids)
    with pytest.raises(ValueError, match="grids are on cpu, but the tokens are on meta"):
        uhd_ops.window_mean(x.to("meta"), grids)
    with pytest.raises(TypeError, match="max_tokens must be an int, got float"):
        PaddedGrids(1.0, 1, device="cpu")
    with pytest.raises(ValueError, match="max_views must be at least 1, got 0"):
        PaddedGrids(1, 0, device="cpu")
    absent = "device must be one that is there, got 'cuda:99': "
    with pytest.raises(ValueError, match=absent):
        PaddedGrids(1, 1, device="cuda:99")
    with pytest.raises(ValueError, match=absent):
        PackedGrids([]).to("cuda:99")
    with pytest.raises(TypeError, match="it has no copies"):
        copy.deepcopy(grids)


def test_an_update_between_forward_and_backward_does_not_matter():
    grids = padded_grids()
    grids.update([(4, 6)])
    x = torch.randn(MAX_TOKENS, 8, requires_grad=True)
    out = uhd_ops.window_mean(x, grids)
    grids.update([(2, 2)])
    out.sum().backward()
    assert_same_bits(x.grad[:24], torch.full((24, 8), 0.25))
    assert not x.grad[24:].any()


def test_another_thread_may_update_while_an_operator_runs():
    """A call that sees a mixture of two lists of grids divides by zero, which ends the process."""
    # Long tables, which take long to write and to read.
    layouts = [PackedGrids(pairs) for pairs in ([(64, 64)], [(1, 1)] * 4096, [(2, 2)] * 1024)]
    grids = PaddedGrids(4096, 4096, {2: 4096}, device="cpu")
    grids.update(layouts[0])
    x = torch.randn(4096, 1)
    wanted = []
    for pairs in layouts:
        tokens = PackedGrids(pairs).num_tokens
        mean = uhd_ops.window_mean(x[:tokens], pairs)
        wanted.append(torch.cat([mean, mean.new_zeros(4096 - len(mean), 1)]))
    done = threading.Event()

    def update():
        while not done.is_set():
            for pairs in layouts:
                grids.update(pairs)

    thread = threading.Thread(target=update)
    thread.start()
    seen, calls = set(), 0
    try:
        while calls < 300 or len(seen) < 2:  # until the grids have changed between two calls
            out, calls = uhd_ops.window_mean(x, grids), calls + 1
            seen.add(next(i for i, mean in enumerate(wanted) if torch.equal(out, mean)))
    finally:
        done.set()
        thread.join()


def test_an_update_leaves_the_tables_of_running_calls_alone():
    grids = padded_grids()
    grids.update([(4, 6)])
    taken = grids.view_table(2, torch.device("cpu")), grids.cu_seqlens
    before = [table.clone() for table in taken]
    grids.update([(2, 2)])
    for table, was in zip(taken, before, strict=True):
        assert_same_bits(table, was)


def test_one_compiled_graph_serves_every_update():
    grids = padded_grids()
    x = torch.randn(MAX_TOKENS, 8)
    compiled = torch.compile(uhd_ops.window_mean, fullgraph=True)
    for batch in BATCHES:
        grids.update(batch)
        with torch._dynamo.config.patch(error_on_recompile=batch is not BATCHES[0]):
            assert_same_bits(compiled(x, grids), uhd_ops.window_mean(x, grids))
