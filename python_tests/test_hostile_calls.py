# SPDX-License-Identifier: Apache-2.0
"""What hostile calls have found, and the fuzz that found it (python_tests/fuzz, .ci/fuzz.sh)."""

import pytest
import torch
from battery.marks import native_only
from fuzz import direct, public, run

import uhd_ops

OPS = torch.ops.uhd_ops
X = torch.randn(16, 8)
HEADS = torch.randn(16, 2, 4)
# Views whose tokens wrap around, to none and to a negative number.
WRAPPED = torch.tensor([[0, 2**32, 2**32, 0], [0, 0, 0, 4]])
NEGATIVE = torch.tensor([[0, 2**32, 2**31, 0], [-(2**63), 0, 0, 4]])
META = torch.zeros(2, 4, dtype=torch.long, device="meta")
TABLE = torch.tensor([[0, 4, 4, 0], [16, 0, 0, 4]])
PRODUCTS = torch.randn(0, 5)

WRAPS = {
    "mean": lambda views: OPS.window_mean(X, views, 2**31, 4),
    "gradient of mean": lambda views: OPS._window_mean_backward(X[:4], views, 2**31, 16),
    "pool": lambda views: OPS.window_pool(X, X, views, 2**31, 4),
    "attention": lambda views: OPS.window_attention(*[HEADS] * 3, views, 2**31, 4, 1.0, False),
    "unshuffle": lambda views: OPS.pixel_unshuffle(X, views, 2**20, 4),
}
OTHERS = {
    "group": lambda: OPS._linear_activation_backward(
        X[:4, :5], PRODUCTS, None, "gelu", 2**62, False
    ),
    "repeat": lambda: OPS._view_table([1, 1] * 4, 2**62, 2),
    "sides": lambda: OPS._view_table([2**32, 2**32], 1, 2),
    "sum": lambda: OPS._view_table([2**62, 1] * 2, 1, 2),
    "parts": lambda: OPS._window_attention_rotary(
        *[HEADS] * 3, 2, HEADS[:, :1], HEADS[:, :1], 2**62, TABLE, 2, 4, 1.0, False
    ),
    "heads": lambda: OPS.window_attention_qkvpacked(HEADS, -(2**63), TABLE, 2, 4, 1.0, False),
}
MIXED = {
    "table": lambda: OPS.window_mean(X, META, 2, 4),
    "logits": lambda: OPS.window_pool(X, X.to("meta"), TABLE, 2, 4),
    "keys": lambda: OPS.window_attention(HEADS, HEADS.to("meta"), HEADS, TABLE, 2, 4, 1.0, False),
}


@native_only("without the native library nothing is registered")
@pytest.mark.parametrize("views", [WRAPPED, NEGATIVE], ids=["to none", "negative"])
@pytest.mark.parametrize("name", WRAPS)
def test_sizes_that_wrap_around_are_refused(name, views):
    with pytest.raises(RuntimeError, match="64 bits"):
        WRAPS[name](views)


GAPS = {  # a token or a window that no view has, or that two of them have
    "tokens": [[0, 2, 4, 0], [9, 1, 7, 2], [16, 0, 0, 6]],
    "windows": [[0, 2, 4, 0], [8, 2, 4, 3], [16, 0, 0, 5]],
    "tokens at the end": [[0, 4, 4, 0], [15, 0, 0, 4]],
    "windows at the end": [[0, 4, 4, 0], [16, 0, 0, 3]],
}


@native_only("without the native library nothing is registered")
@pytest.mark.parametrize("name", GAPS)
def test_views_that_do_not_follow_each_other_are_refused(name):
    with pytest.raises(RuntimeError, match="does not continue the rows above it"):
        OPS.window_mean(X, torch.tensor(GAPS[name]), 2, 6)


@native_only("without the native library nothing is registered")
@pytest.mark.parametrize("name", OTHERS)
def test_options_that_wrap_around_are_refused(name):
    with pytest.raises(RuntimeError, match=r"64 bits|channels cannot pair|must be \(N, H"):
        OTHERS[name]()


@native_only("without the native library nothing is registered")
@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_several_devices_are_refused(name):
    with pytest.raises(RuntimeError, match="tensors must be on one device, got cpu, meta"):
        MIXED[name]()


@native_only("without the native library nothing is registered")
def test_nothing_repeated_is_nothing():
    assert OPS._view_table([], 2**62, 2).tolist() == [[0, 0, 0, 0]]


def test_a_view_without_columns_costs_nothing_however_tall():
    q = torch.randn(4, 2, 8)
    grids = [(2**40, 0), (2, 2)]
    out = uhd_ops.window_attention(q, q, q, grids, window=2, order_in="window")
    torch.testing.assert_close(out, uhd_ops.window_attention(q, q, q, [(2, 2)], window=2))


def test_tokens_that_share_memory_are_read_right():
    q = torch.randn(512, dtype=torch.float64).as_strided((32, 2, 8), (1, 1, 1))
    k = torch.randn(32, 2, 8, dtype=torch.float64)
    out = uhd_ops.view_attention(q, k, k, [(4, 8)])
    torch.testing.assert_close(out, uhd_ops.view_attention(q.contiguous(), k, k, [(4, 8)]))


@pytest.mark.parametrize("kind", ["public", "direct"])
def test_the_fuzz_tells_wrong_from_refused(kind):
    def wrong():
        raise AssertionError("off by one")

    def refused():
        raise ValueError("x must be a tensor")

    def crash():
        raise SystemError("from C")

    assert run.try_case(kind, lambda seed: ("a", wrong), 0)[0] == "wrong"
    assert run.try_case(kind, lambda seed: ("a", refused), 0)[0] == "ValueError"
    assert run.try_case(kind, lambda seed: ("a", lambda: True), 0)[0] == "right"
    assert (run.try_case(kind, lambda seed: ("a", crash), 0)[0] == "wrong") == (kind == "public")


@native_only("a direct call needs the native library")
@pytest.mark.filterwarnings("ignore:Sparse|.*deprecated|The PyTorch API of nested:UserWarning")
def test_cases_are_the_same_for_a_seed():
    for make in (public.case, direct.case):
        for seed in range(40):
            assert make(seed)[0] == make(seed)[0]
