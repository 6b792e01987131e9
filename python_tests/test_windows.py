# SPDX-License-Identifier: Apache-2.0
"""Index tables: they are those of the definition's loops, and each is made once."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

import uhd_ops
from uhd_ops import PackedGrids
from uhd_ops.nn import EarlyCompressor
from uhd_ops.reference import _token_order, _windows
from uhd_ops.windows import Windows, join_prefix, split_prefix

CPU = torch.device("cpu")
GRIDS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


def of(pairs, window):
    return Windows.of(PackedGrids(pairs), window, CPU)


@given(pairs=GRIDS, window=st.integers(1, 6))
@example(pairs=[(3, 70000)], window=2**31 - 1)
def test_places_of_tokens(pairs, window):
    where = of(pairs, window)
    windows_of_views = [-(-h // window) * -(-w // window) for h, w in pairs]
    views = [view for view, (h, w) in enumerate(pairs) for _ in range(h * w)]
    assert where.view_of_token().tolist() == views
    wanted = []
    for (h, w), first in zip(pairs, torch.tensor([0, *windows_of_views]).cumsum(0), strict=False):
        rows, cols = torch.arange(h)[:, None] // window, torch.arange(w) // window
        wanted += (int(first) + rows * -(-w // window) + cols).flatten().tolist()
    assert where.window_of_token().tolist() == wanted
    assert where.sizes().tolist() == [wanted.count(m) for m in range(sum(windows_of_views))]
    assert where.all_windows == sum(windows_of_views)


@given(pairs=GRIDS, window=st.integers(1, 6))
def test_slots_are_those_of_the_definition(pairs, window):
    where = of(pairs, window)
    tokens, present = where.slots()
    wanted = _windows.window_tokens(pairs, window)
    assert torch.equal(tokens.long(), wanted[0])
    assert torch.equal(present, wanted[1])
    assert torch.equal(wanted[0].flatten()[where.slot_of_token()], torch.arange(where.num_tokens))
    assert wanted[1].flatten()[where.slot_of_token()].all()


@given(pairs=GRIDS, window=st.integers(1, 6))
def test_windows_by_shape_are_those_of_the_definition(pairs, window):
    found, place = of(pairs, window).by_shape()
    wanted = {}
    for tokens, present in zip(*_windows.window_tokens(pairs, window), strict=True):
        square = present.view(window, window)
        shape = int(square.any(1).sum()), int(square.any(0).sum())
        wanted.setdefault(shape, []).append(tokens[present].tolist())
    assert {shape: rows.tolist() for shape, rows in found.items()} == wanted
    listed = torch.cat([torch.empty(0, dtype=torch.int64), *(r.flatten() for r in found.values())])
    assert listed[place.long()].tolist() == list(range(len(place)))


@given(pairs=GRIDS, order=st.sampled_from([(), (2,), (3, 2), (7, 4, 2)]))
def test_orders_are_those_of_the_definition(pairs, order):
    index, inverse = of(pairs, 2).permutation((), order)
    assert torch.equal(index.long(), _token_order.tokens_in_order(pairs, order))
    assert index[inverse.long()].tolist() == list(range(len(index)))


@given(pairs=GRIDS, window=st.integers(1, 6))
def test_windows_by_length(pairs, window):
    where = of(pairs, window)
    lengths, *moves = where.by_length()
    (grouped, raster), to_raster, to_window_major = moves
    assert lengths == sorted(where.sizes().tolist())
    assert grouped[raster.long()].tolist() == list(range(where.all_tokens))
    # Tokens of a group are those of one window, in raster order.
    of_group = where.window_of_token()[grouped.long()].split(lengths)
    assert all(len(group.unique()) == 1 for group in of_group)
    assert all(group.tolist() == sorted(group.tolist()) for group in grouped.split(lengths))
    assert torch.equal(to_raster[0], raster)
    major, _ = where.permutation((), (window,))
    assert torch.equal(grouped[to_window_major[0].long()], major)
    index, inverse = to_window_major
    assert index[inverse.long()].tolist() == list(range(where.all_tokens))


@given(pairs=GRIDS, prefix=st.integers(0, 3))
def test_prefix_tokens_stand_in_front_of_their_view(pairs, prefix):
    grids = PackedGrids(pairs)
    first = torch.randn(len(pairs), prefix, 3, requires_grad=True)
    patches = torch.randn(grids.num_tokens, 3, requires_grad=True)
    joined = join_prefix(first, patches, grids)
    views = zip(first, patches.split([h * w for h, w in pairs]), strict=True) if pairs else ()
    wanted = torch.cat([patches[:0], *(part for view in views for part in view)])
    assert torch.equal(joined, wanted)
    assert len(joined) == grids.sequences(prefix).num_tokens
    again = split_prefix(joined, grids, prefix)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], patches)
    weight = torch.randn_like(joined)
    grads = torch.autograd.grad((joined * weight).sum(), (first, patches), allow_unused=True)
    split = split_prefix(weight, grids, prefix)
    assert prefix == 0 or torch.equal(grads[0], split[0])
    assert torch.equal(grads[1], split[1])


def test_batched_tokens_lie_one_view_behind_the_other():
    one, many = Windows.of(PackedGrids([(5, 7)]), 3, CPU, 4), of([(5, 7)] * 4, 3)
    assert (one.num_tokens, one.num_windows, one.all_tokens, one.all_windows) == (35, 6, 140, 24)
    assert torch.equal(one.views, many.views)
    assert torch.equal(one.slots()[0], many.slots()[0])


def test_tables_are_small():
    where = of([(40, 50), (3, 5)], 3)
    tables = (*where.slots()[:1], where.slot_of_token(), where.sizes(), where.view_of_token())
    tables += (where.window_of_token(), *where.permutation((), (2,)), *where.with_prefix(2))
    assert {table.dtype for table in tables} == {torch.int32}


class Makings:
    """Counts how often the methods of Windows that make tables run."""

    def __init__(self, monkeypatch):
        self.count = {}
        for name in ("_slots", "_slot_of_token", "_by_shape", "_ordered", "_with_prefix"):
            monkeypatch.setattr(Windows, name, self.counted(name, getattr(Windows, name)))

    def counted(self, name, make):
        def run(*args):
            self.count[name] = self.count.get(name, 0) + 1
            return make(*args)

        return run


def test_five_forward_passes_make_each_table_once(monkeypatch):
    beit = pytest.importorskip("timm.models.beit")
    uhd_ops.clear_caches()
    makings = Makings(monkeypatch)
    model = beit.Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, use_rel_pos_bias=True
    )
    model = uhd_ops.insert_early_compressor(model.eval(), 1)
    cross = EarlyCompressor(32, 2, attention="cross_top_left").eval()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(1, 3, 32, 32))
            cross(torch.randn(2, 16, 32), (4, 4))
            uhd_ops.reorder_tokens(torch.randn(16, 2), [[4, 4]], "block")
            uhd_ops.reorder_tokens(torch.randn(16, 2), PackedGrids([(4, 4)]), "block")
    # Once for one image, and once for a batch of two; an order takes two.
    assert makings.count == {"_slots": 2, "_slot_of_token": 1, "_ordered": 2}
