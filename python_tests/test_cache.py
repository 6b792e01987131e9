# SPDX-License-Identifier: Apache-2.0
"""Tables that are kept: their bytes are limited, and nothing else depends on what is kept."""

import gc
import weakref

import pytest
import torch
from battery import assert_same_bits
from battery.calls import in_threads

import uhd_ops
from uhd_ops import PackedGrids, PaddedGrids, _cache
from uhd_ops.windows import Windows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def limit():
    """Start with nothing kept, and restore the limit."""
    uhd_ops.clear_caches()
    before = uhd_ops.set_cache_limit(2**20)
    yield
    uhd_ops.set_cache_limit(before)
    uhd_ops.clear_caches()


def reordered(pairs):
    """Make two index tables of 4 bytes per token."""
    x = torch.arange(float(PackedGrids(pairs).num_tokens))[:, None]
    return uhd_ops.reorder_tokens(x, pairs, "block")


def bytes_of(grids):
    """What the tables hold, counted by looking."""
    return sum(tensor.nbytes for tensor in _cache._tensors(list(grids._tables.values())))


def test_bytes_are_limited():
    made = []
    for width in range(100, 160):  # 60 of them would need 60 * 8 * 100 * 130 bytes
        reordered([(100, width)])
        made.append(weakref.ref(PackedGrids([(100, width)])))
    gc.collect()
    alive = [grids() for grids in made if grids() is not None]
    assert 0 < sum(bytes_of(grids) for grids in alive) <= 2**20
    assert made[-1]() is not None
    assert made[0]() is None


def test_the_limit_counts_what_there_is():
    for width in range(100, 105):
        reordered([(100, width)])
    held = [bytes_of(PackedGrids([(100, width)])) for width in range(100, 105)]
    assert sum(held) <= _cache._held <= sum(held) + 5 * 6000  # and Python objects
    assert uhd_ops.clear_caches() >= sum(held)
    assert uhd_ops.clear_caches() < 10_000  # the five grids that this test just made again


def test_grids_in_use_stay():
    favourite = PackedGrids([(64, 64)])
    tables = Windows.of(favourite, 2, CPU).permutation((), (2,))
    for width in range(100, 160):
        reordered([(100, width)])
        assert Windows.of(favourite, 2, CPU).permutation((), (2,))[0] is tables[0]


def test_a_lower_limit_frees_at_once():
    grids = PackedGrids([(100, 100)])
    reordered(grids)
    table = weakref.ref(Windows.of(grids, 1, CPU).permutation((), (2,))[0])
    assert table() is not None
    assert uhd_ops.set_cache_limit(1000) == 2**20
    assert table() is None
    assert not grids._tables
    assert_same_bits(
        reordered(grids),
        uhd_ops.reference.reorder_tokens(torch.arange(10_000.0)[:, None], [(100, 100)], "block"),
    )


def test_one_table_larger_than_the_limit():
    uhd_ops.set_cache_limit(10_000)
    grids = PackedGrids([(100, 100)])
    wanted = uhd_ops.reference.reorder_tokens(
        torch.arange(10_000.0)[:, None], [(100, 100)], "block"
    )
    for _ in range(3):
        assert_same_bits(reordered(grids), wanted)
        assert _cache._held <= 10_000


def test_nothing_need_be_kept():
    uhd_ops.set_cache_limit(0)
    grids = PackedGrids([(6, 7), (3, 5)])
    x = torch.randn(57, 8, requires_grad=True)
    for _ in range(2):
        out = uhd_ops.window_mean(x, grids, 2, order_in="block")
        assert_same_bits(out, uhd_ops.window_mean(x, [(6, 7), (3, 5)], 2, order_in="block"))
        out.sum().backward()
    assert _cache._held == 0
    assert not grids._tables


def test_what_a_call_uses_outlives_the_cache():
    grids = PackedGrids([(20, 30)])
    x = torch.randn(600, 4, requires_grad=True)
    out = uhd_ops.reorder_tokens(x, grids, "block")
    where = Windows.of(grids, 2, CPU)
    uhd_ops.clear_caches()
    out.square().sum().backward()
    assert_same_bits(x.grad, 2 * x.detach())
    assert where.slots()[0].shape == (150, 4)  # made anew, and kept again
    assert bytes_of(grids) > 0


def test_equal_grids_are_one():
    first = PackedGrids([(4, 6), (3, 5)])
    assert PackedGrids([[4, 6], [3, 5]]) is first
    assert PackedGrids.of(torch.tensor([[4, 6], [3, 5]])) is first
    assert first.merged(2) is PackedGrids([(2, 3), (2, 3)])
    uhd_ops.clear_caches()
    assert PackedGrids([(4, 6), (3, 5)]) is first
    gone = weakref.ref(PackedGrids([(41, 61)]))
    uhd_ops.clear_caches()
    assert gone() is None


def test_threads_share_a_cache_that_is_too_small():
    uhd_ops.set_cache_limit(50_000)
    layouts = [[(20, 20 + i), (7, i)] for i in range(12)]
    wanted = {i: reordered(pairs).clone() for i, pairs in enumerate(layouts)}
    wrong = []

    def work(seed):
        order = torch.randperm(len(layouts), generator=torch.Generator().manual_seed(seed))
        for i in order.tolist() * 20:
            if not torch.equal(reordered(layouts[i]), wanted[i]):
                wrong.append(i)
            if i == seed:
                uhd_ops.clear_caches()

    in_threads(work, range(6))
    assert wrong == []
    assert 0 <= _cache._held <= 50_000
    uhd_ops.clear_caches()
    assert _cache._held == 0


def test_bad_limits():
    for bad, error, message in (
        (-1, ValueError, "max_bytes must be at least 0, got -1"),
        (1.5, TypeError, "max_bytes must be an int, got float"),
        (True, TypeError, "max_bytes must be an int, got bool"),
    ):
        with pytest.raises(error, match=message):
            uhd_ops.set_cache_limit(bad)
    assert uhd_ops.set_cache_limit(2**20) == 2**20


class OnStream(torch.Tensor):
    """A tensor that notes the streams which it was told of."""

    def record_stream(self, stream):
        self.streams = [*getattr(self, "streams", []), stream]


class Stream:
    """What a CUDA stream does for the cache."""

    device = None

    def __init__(self):
        self.waited = []

    def record_event(self):
        return "made"

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """A device of which only the streams are asked."""
    state = {"stream": Stream(), "capturing": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    yield state
    _cache._captured.clear()


def table_on(grids):
    make = lambda: torch.ones(1000).as_subclass(OnStream)  # noqa: E731
    return _cache.kept(grids, "table", torch.device("cuda", 0), make)


def test_another_stream_waits_for_a_table(cuda):
    grids = PackedGrids([(6, 7)])
    first, table = cuda["stream"], table_on(grids)
    assert table_on(grids) is table
    assert first.waited == []
    assert not hasattr(table, "streams")
    second = cuda["stream"] = Stream()
    assert table_on(grids) is table
    assert second.waited == ["made"]
    assert table.streams == [second]  # the allocator waits for it before it gives the memory away


def test_a_table_that_a_graph_reads_is_never_freed(cuda):
    grids, other = PackedGrids([(6, 7)]), PackedGrids([(6, 8)])
    table, held = table_on(grids), _cache._held
    cuda["capturing"] = True
    assert table_on(grids) is table
    assert _cache._held < held  # nothing of it can be freed, so it does not count
    made = table_on(other)  # in the memory of the graph: of no use to others
    cuda["capturing"] = False
    uhd_ops.clear_caches()
    assert table_on(grids) is table
    assert table_on(other) is not made


def test_tables_of_the_host_move_before_a_graph_is_captured(cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: ("pinned", table))
    table, device = torch.ones(3), torch.device("cuda", 0)
    assert _cache.staged(table, device) == ("pinned", table)
    assert _cache.staged(table, CPU) is table
    assert _cache.to_device(table, CPU) is table
    cuda["capturing"] = True
    message = "what this call makes of its grids is not on cuda:0 yet: make the same call once"
    with pytest.raises(NotImplementedError, match=message):
        _cache.to_device(table, device)
    grids, other = PackedGrids([(6, 7)]), PackedGrids([(6, 8)])
    with pytest.raises(NotImplementedError, match=message):
        grids.view_table(2, device)
    assert not grids._tables
    assert _cache.to_device(table, CPU) is table
    assert other.view_table(2, CPU).shape == (2, 4)


def test_padded_grids_are_not_updated_in_a_captured_graph(cuda):
    grids = PaddedGrids(64, 4, device="cpu")
    grids.update([(4, 6)])
    before = grids.view_table(2, CPU)
    grids.device, cuda["capturing"] = torch.device("cuda", 0), True
    with pytest.raises(NotImplementedError, match=r"PaddedGrids\.update must be outside"):
        grids.update([(2, 2)])
    assert list(grids.current) == [(4, 6)]
    assert grids.view_table(2, grids.device) is before
    assert grids.cu_seqlens.tolist() == [0, 24, 24, 24, 24]
