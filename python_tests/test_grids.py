# SPDX-License-Identifier: Apache-2.0
"""PackedGrids: what it counts, what it refuses, and that it never changes."""

import copy
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from battery.marks import native_only
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from uhd_ops import PackedGrids, window_attention
from uhd_ops.reference import _windows

GRIDS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


@given(pairs=GRIDS, window=st.integers(1, 6))
def test_counts(pairs, window):
    grids = PackedGrids(pairs)
    tokens, present = _windows.window_tokens(pairs, window)
    assert grids.num_views == len(grids) == len(pairs)
    assert list(grids) == pairs
    assert grids.num_tokens == int(present.sum())
    assert grids.num_windows(window) == len(tokens)
    assert grids.merged(window).num_tokens == len(tokens)
    assert grids.max_seqlen == max([h * w for h, w in pairs], default=0)
    lengths = [h * w for h, w in pairs]
    assert grids.cu_seqlens().tolist() == [sum(lengths[:i]) for i in range(len(pairs) + 1)]
    assert grids.cu_seqlens().dtype == torch.int32


@given(pairs=GRIDS, window=st.integers(1, 6))
def test_every_token_is_in_one_window(pairs, window):
    # The definition that everything else is measured against.
    tokens, present = _windows.window_tokens(pairs, window)
    assert sorted(tokens[present].tolist()) == list(range(sum(h * w for h, w in pairs)))
    # A slot without a token repeats one of the same window.
    for row, there in zip(tokens, present, strict=True):
        assert set(row.tolist()) == set(row[there].tolist())


@given(pairs=GRIDS, window=st.integers(1, 6))
@native_only("the definitions read no table")
def test_view_table(pairs, window):
    table = PackedGrids(pairs).view_table(window, torch.device("cpu"))
    assert table.shape == (len(pairs) + 1, 4)
    first = [0, 0]
    for row, (h, w) in zip(table.tolist(), [*pairs, (0, 0)], strict=True):
        assert row == [first[0], h, w, first[1]]
        first = [first[0] + h * w, first[1] + PackedGrids([(h, w)]).num_windows(window)]


@pytest.mark.parametrize("window", [0, -2])
def test_windows_are_positive(window):
    grids = PackedGrids([(4, 6)])
    with pytest.raises(ValueError, match=f"^window must be at least 1, got {window}$"):
        grids.num_windows(window)
    with pytest.raises(ValueError, match=f"^factor must be at least 1, got {window}$"):
        grids.merged(window)


@pytest.mark.parametrize("window", [2.0, "2", None, True])
def test_windows_are_integers(window):
    kind = type(window).__name__
    with pytest.raises(TypeError, match=f"^window must be an int, got {kind}$"):
        PackedGrids([(4, 6)]).num_windows(window)


def test_one_grid_in_every_form():
    forms = [
        [(4, 6)],
        ((4, 6),),
        [[4, 6]],
        (4, 6),
        [4, 6],
        torch.tensor([[4, 6]]),
        np.array([[4, 6]], dtype=np.int32),
        [(np.int64(4), np.uint8(6))],
        [tuple(torch.tensor([4, 6]))],
        tuple(torch.tensor([4, 6])),
        PackedGrids([(4, 6)]),
    ]
    for form in forms:
        grids = PackedGrids.of(form)
        assert grids == PackedGrids([(4, 6)]), form
        assert all(type(side) is int for pair in grids for side in pair), form


def test_of_repeats_one_pair():
    assert PackedGrids.of((4, 6), batch=3) == PackedGrids([(4, 6)] * 3)
    assert PackedGrids.of(PackedGrids([(4, 6)]), batch=2) == PackedGrids([(4, 6)] * 2)
    assert PackedGrids.of((4, 6), batch=0) == PackedGrids([])
    assert PackedGrids.of([(4, 6)]) is PackedGrids.of([[4, 6]]), "made once, then cached"


def test_equality_and_hash():
    a, b, c = PackedGrids([(4, 6)]), PackedGrids([[4, 6]]), PackedGrids([(6, 4)])
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert a != [(4, 6)]
    assert len({a, b, c}) == 2
    assert a[0] == (4, 6)
    assert a[-1] == (4, 6)
    assert repr(a) == "PackedGrids([(4, 6)])"
    many = PackedGrids([(n, 6) for n in range(1, 501)])
    assert repr(many) == (
        "PackedGrids([(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6), ... 493 more ..., (500, 6)])"
    )
    with pytest.raises(IndexError):
        a[1]


def test_immutable():
    pairs = [[4, 6]]
    grids = PackedGrids(pairs)
    pairs[0][0] = 99
    assert list(grids) == [(4, 6)]
    with pytest.raises(
        AttributeError, match=r"^PackedGrids is immutable; cannot set 'num_tokens'$"
    ):
        grids.num_tokens = 3
    with pytest.raises(AttributeError, match=r"^PackedGrids is immutable; cannot delete 'num_"):
        del grids.num_tokens


def test_copies_and_pickles():
    grids = PackedGrids([(4, 6), (0, 3)])
    assert copy.copy(grids) == grids
    assert copy.deepcopy(grids) == grids
    assert pickle.loads(pickle.dumps(grids)) == grids


def test_sides_are_not_truncated_to_32_bits():
    side = 1 << 20
    assert PackedGrids([(side, side)]).num_tokens == 1 << 40
    assert PackedGrids([(side, side)]).num_windows(2) == 1 << 38


@pytest.mark.parametrize("grids", [{(4, 6)}, iter([(4, 6)]), "46", b"46", 4.0, object()])
def test_other_types_are_refused(grids):
    with pytest.raises(TypeError, match=r"^grids must be a PackedGrids, a sequence of"):
        PackedGrids(grids)


def test_inference_mode_does_not_reach_later_training():
    grids = [(5, 7)]  # in no other test: the tables of these grids must be made here
    x = torch.randn(35, 2, 3, requires_grad=True)
    with torch.inference_mode():
        window_attention(x, x, x, grids)
        merged = PackedGrids.of(grids).merged(3).cu_seqlens()
    assert not merged.is_inference()
    window_attention(x, x, x, grids).sum().backward()  # saves the table
    assert x.grad is not None


def test_fake_tensors_do_not_reach_later_calls():
    grids = [(5, 8)]
    with FakeTensorMode():
        assert PackedGrids.of(grids).cu_seqlens().tolist() == [0, 40]
    table = PackedGrids.of(grids).view_table(2, torch.device("cpu"))
    assert table.tolist() == [[0, 5, 8, 0], [40, 0, 0, 12]]


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert PackedGrids([(5, 9)]).cu_seqlens().tolist() == [0, 45]


def test_cu_seqlens_belongs_to_the_caller():
    PackedGrids.of([(4, 5)]).cu_seqlens().add_(7)
    assert PackedGrids.of([(4, 5)]).cu_seqlens().tolist() == [0, 20]


def test_rows_of_tensors_and_arrays_are_pairs():
    wanted = PackedGrids([(4, 6), (3, 5)])
    assert PackedGrids(list(np.array([[4, 6], [3, 5]]))) == wanted
    assert PackedGrids(list(torch.tensor([[4, 6], [3, 5]]))) == wanted


def test_a_pytree_of_one_tensor():
    grids = PackedGrids([(4, 6), (3, 5)])
    leaves, spec = pytree.tree_flatten({"grids": grids, "x": 1})
    assert [leaf.tolist() for leaf in leaves[:1]] == [[[4, 6], [3, 5], [0, 0]]]
    assert pytree.tree_unflatten(leaves, spec)["grids"] is grids
    assert pytree.tree_structure(PackedGrids([(1, 1)])) == pytree.tree_structure(grids)
    assert pytree.tree_map(lambda leaf: leaf.clone(), grids) is grids
    assert pytree.tree_map(lambda leaf: None, [grids, 3])[1] is None  # as torch's checkpoint does
