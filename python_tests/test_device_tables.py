# SPDX-License-Identifier: Apache-2.0
"""What the host makes of grids reaches a device without a wait, and compiled graphs not at all.

The meta device stands for a GPU: its tables are made in the same way, and so are graphs.
"""

import contextlib
from functools import partial

import pytest
import torch
from battery import GRIDDED
from battery.marks import native_only
from functorch.compile import make_boxed_func
from specs import SPECS
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import uhd_ops
from uhd_ops import PackedGrids, PaddedGrids, _cache, _native, _view_tables, nn, padded_grids
from uhd_ops.nn.positions import Frequencies
from uhd_ops.nn.query_resampler import sincos_2d
from uhd_ops.nn.score_bias import DecomposedPositionBias, RelativePositionBias
from uhd_ops.retrofit.padded_layout import FramedLayout, PaddedLayout
from uhd_ops.retrofit.relative_positions import _neighbours, relative_index
from uhd_ops.windows import Windows

PAIRS = [(4, 6), (3, 5)]
TOKENS = 39
CPU, META = torch.device("cpu"), torch.device("meta")


class Transfers(TorchDispatchMode):
    """Note what goes from the CPU to another device, and what of it the host waits for."""

    def __init__(self, staged):
        super().__init__()
        self.staged, self.count, self.waiting = staged, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = function(*args, **kwargs), function.name()
        source = args[1] if name == "aten::copy_" else args[0] if args else None
        devices = [x.device.type for x in (source, out) if isinstance(x, torch.Tensor)]
        if devices == ["cpu", "meta"]:
            self.count += 1
            queued = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            if not queued or not any(source is tensor for tensor in self.staged):
                self.waiting.append(f"{name} of {tuple(source.shape)}")
        return out


@pytest.fixture
def transfers(monkeypatch):
    """Transfers to meta, which are to go through memory that a GPU copies from on its own."""
    uhd_ops.clear_caches()  # nothing is on a device yet
    staged = []

    def stage(table, device):
        staged.append(table.clone())
        return staged[-1]

    # Tables that are kept are made outside of all modes, where nobody would see them move.
    monkeypatch.setattr(_cache, "_disable_current_modes", contextlib.nullcontext)
    monkeypatch.setattr(_cache, "staged", stage)
    monkeypatch.setattr(padded_grids, "staged", stage)
    yield Transfers(staged)
    uhd_ops.clear_caches()


def on_meta(name):
    call = SPECS[name].make(PAIRS, torch.bfloat16)
    call = call.map_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"))
    return lambda: getattr(uhd_ops, name)(*call.args, **call.kwargs)


def rows(*shape):
    return torch.empty(shape or (TOKENS, 16), device="meta")


def trained(module):
    return lambda: module.train()(rows(), PAIRS)


def merged_table():
    layout = PaddedLayout(PackedGrids([*PAIRS, (4, 6)]), 24, 0, META)
    layout.frequencies = Frequencies(rows(4), rows(4).long())
    return layout.merge_table(*rows(2, 3, 24, 4), 2, "center")


# What each call has to move, the first time; most of it is kept.
CALLS = {
    **{name: (int(name in GRIDDED), lambda name=name: on_meta(name)) for name in SPECS},
    "drop_path": (3, lambda: trained(nn.EarlyCompressor(16, 2, drop_path=0.5, device="meta"))),
    "resampler": (1, lambda: trained(nn.QueryResampler(16, 32, num_queries=4, device="meta"))),
    "sincos_2d": (0, lambda: lambda: sincos_2d((4, 6), 16, META)),
    "by_length": (6, lambda: Windows.of(PackedGrids(PAIRS), 2, META).by_length),
    "coordinates": (1, lambda: lambda: PackedGrids(PAIRS).coordinates(META)),
    "relative bias": (0, lambda: partial(RelativePositionBias(rows(2, 3, 3)), rows())),
    "decomposed bias": (
        0,
        lambda: lambda: DecomposedPositionBias(rows(3, 4), rows(3, 4))(rows(1, 1, 4, 4)),
    ),
    "relative index": (0, lambda: lambda: relative_index((4, 6), 2, "center", 1, META)),
    "neighbours": (1, lambda: lambda: _neighbours(4, 7, META)),
    "padded layout": (2, lambda: lambda: PaddedLayout(PackedGrids(PAIRS), 24, 1, META)),
    "framed layout": (4, lambda: lambda: FramedLayout(PackedGrids(PAIRS), (4, 6), META).merged(2)),
    "padded table": (6, lambda: merged_table),
    "padded grids": (2, lambda: lambda: PaddedGrids(64, 4, device="meta").merged(2)),
    "grids": (1, lambda: lambda: PackedGrids(PAIRS).to(META)),
}


@native_only("the definitions are made of tables on the host")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_a_copy(name, transfers):
    count, call = CALLS[name][0], CALLS[name][1]()
    with transfers:
        call()
    assert transfers.waiting == []
    assert transfers.count == count


# ---- in a graph


@pytest.fixture
def devices():
    """Compile with a backend that lists the devices of all that it gets, gradients included."""
    seen = set()

    def record(graph, inputs):
        values = (node.meta.get("val") for node in graph.graph.nodes)
        seen.update(value.device.type for value in values if isinstance(value, torch.Tensor))
        return make_boxed_func(graph.forward)

    yield seen, aot_autograd(fw_compiler=record, bw_compiler=record)
    torch._dynamo.reset()
    uhd_ops.clear_caches()  # grids that were moved stay so, which others' graphs would notice


def step(x, grids):
    q = x.unflatten(-1, (2, 8))
    attended = uhd_ops.window_attention(q, q, q, grids).flatten(-2)
    merged = uhd_ops.window_mean(attended, grids, order_in="block")
    if not isinstance(grids, PackedGrids):
        return merged
    pooled = uhd_ops.window_pool(merged, merged, grids.merged())
    return uhd_ops.window_mean(pooled, grids.merged().merged().sequences(), 1)


@native_only("the definitions are made of tables on the host")
def test_a_graph_computes_nothing_on_the_cpu(devices):
    seen, backend = devices
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    # The number of views is a variable from the start: it changes after the sides have.
    batches = [(4, 6), (3, 5)], [(8, 8), (2, 2)], [(1, 1), (5, 6), (2, 9)], [(8, 6)]
    for index, pairs in enumerate(batches):
        grids = PackedGrids(pairs).to(META)
        assert grids.to("meta") is PackedGrids(pairs)
        x = rows(grids.num_tokens, 16).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            out = compiled(x, grids)
        assert out.shape == (grids.merged(4).num_tokens, 16)
        out.sum().backward()
    assert seen == {"meta"}
    compiled(rows(TOKENS, 16), PackedGrids([(3, 13)]))  # which nobody has moved
    assert seen == {"meta", "cpu"}


@native_only("the definitions are made of tables on the host")
@pytest.mark.parametrize("batch", [(), (3,)], ids=["packed", "batched"])
def test_one_grid_of_the_graphs_own(devices, batch):
    seen, backend = devices
    compiled = torch.compile(lambda x: step(x, (x.shape[-2] // 4, 4)), backend=backend)
    for index, height in enumerate((3, 5, 8)):
        x = rows(*batch, height * 4, 16).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            compiled(x).sum().backward()
    assert seen == {"meta"}


@pytest.mark.parametrize("window", [1, 2, 3])
def test_tables_of_a_graph_are_those_of_the_kernels(window, monkeypatch):
    grids = PackedGrids([(4, 6), (0, 3), (3, 5), (1, 1)])
    three, none = PackedGrids([(3, 5)] * 3), PackedGrids([])
    wanted = [each.view_table(window, CPU) for each in (grids, none, three, none)]
    monkeypatch.setattr(_native, "has_kernels", lambda device: False)
    assert torch.equal(_view_tables.table_of_rows(grids.rows, window), wanted[0])
    assert torch.equal(_view_tables.table_of_rows(none.rows, window), wanted[1])
    assert torch.equal(_view_tables.table_of_one(3, 5, 3, window, CPU), wanted[2])
    assert torch.equal(_view_tables.table_of_one(3, 5, 0, window, CPU), wanted[3])
