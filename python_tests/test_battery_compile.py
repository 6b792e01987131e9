# SPDX-License-Identifier: Apache-2.0
"""Every operator under torch.compile: no graph breaks, the same bits, one graph for all grids."""

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
    make_call,
    not_exempt,
    parametrize,
    per_op,
    public,
    run,
)
from battery.calls import batched
from battery.marks import native_only
from specs import SPECS
from specs._spec import ORDERS
from torch._dynamo.testing import CompileCounterWithBackend

from uhd_ops import PackedGrids

pytestmark = [
    native_only("the definition reads grids as data, which is not meant to be compiled"),
    # torch's own code, under dynamo
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]

# Other sides, and other numbers of views; none of the sizes is 0 or 1, which torch specialises on,
# and no two sizes of the first call are equal by chance: torch would take them for one symbol.
MORE_GRIDS = (
    [(7, 4), (2, 9)],
    [(6, 6), (5, 3), (4, 4)],
    [(8, 5), (3, 3), (2, 2), (9, 2), (5, 5)],
    [(10, 7)],
)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_like_eager(name, compiled, call):
    wanted_out, wanted_grads = gradients(public(name), call)
    out, grads = gradients(compiled, call)
    # Where torch computes the values, it may do so in another order under the compiler.
    assert_same(name, "batch_invariance", call, out, wanted_out)
    assert_same(name, "batch_invariance", call, grads, wanted_grads, "gradient")


def assert_compiled_in_the_first_call(graphs):
    # The first call may compile twice: dynamo starts again once it has seen that a float argument,
    # symbolic under dynamic=True, must be a constant.
    assert graphs == graphs[:1] * len(graphs), f"graphs compiled after each call: {graphs}"


def compile_once(name):
    backend = CompileCounterWithBackend("aot_eager")
    return torch.compile(public(name), fullgraph=True, dynamic=True, backend=backend), backend


@pytest.mark.parametrize("name", OPS)
def test_static_shapes(name):
    # What a user writes: no word about dynamic shapes.
    compiled = torch.compile(public(name), fullgraph=True, backend="aot_eager")
    assert_like_eager(name, compiled, make_call(name))


ORDERED = [name for name in GRIDDED if "order_in" in SPECS[name].options]


@parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in not_exempt("native", GRIDDED)),
        *((name, {"order_in": order}) for name in ORDERED for order in ORDERS[1:]),
    ],
)
def test_other_packed_grids_do_not_recompile(name, options):
    compiled, backend = compile_once(name)
    graphs = []
    for grids in (GRIDS, *MORE_GRIDS):
        call = make_call(name, grids=grids, **options)
        assert_like_eager(name, compiled, call.put(call.grids, PackedGrids(grids)))
        graphs.append(backend.frame_count)
    assert_compiled_in_the_first_call(graphs)


@pytest.mark.parametrize("name", not_exempt("native", GRIDDED))
def test_other_pairs_do_not_recompile(name):
    compiled, backend = compile_once(name)
    graphs = []
    for grids in (GRIDS, [(7, 4), (2, 9)], [(6, 8), (5, 5)]):
        assert_like_eager(name, compiled, make_call(name, grids=grids))
        graphs.append(backend.frame_count)
    assert_compiled_in_the_first_call(graphs)


@pytest.mark.parametrize("name", GRIDDED)
def test_another_batch_of_images_does_not_recompile(name):
    compiled, backend = compile_once(name)
    graphs = []
    for batch, pair in ((13, (3, 5)), (3, (6, 4)), (4, (7, 8))):
        call = batched(make_call(name, grids=[pair] * batch), batch)
        assert_like_eager(name, compiled, call)
        graphs.append(backend.frame_count)
    assert_compiled_in_the_first_call(graphs)


@parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in GRIDDED),
        *(("pixel_unshuffle", {"order_in": order}) for order in ORDERS[1:]),
    ],
)
def test_grid_computed_from_the_input(name, options):
    # A model that is compiled as a whole: the grid is the shape of a feature map, symbols there.
    call = batched(make_call(name, grids=[(3, 5)] * 2, **options), 2)

    def model(*maps):
        inner = call.put(call.grids, tuple(maps[0].shape[1:3]))
        for position, feature_map in zip(call.per_token, maps, strict=True):
            inner = inner.put(position, feature_map.flatten(1, 2))
        return run(public(name), inner)

    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    graphs = []
    # A side of the first call that is a size of `qkv`, 3, would be fixed with it.
    for batch, pair in ((13, (5, 7)), (3, (6, 4)), (4, (7, 8))):
        other = make_call(name, grids=[pair] * batch, **options)
        maps = [other.get(p).unflatten(0, (batch, *pair)) for p in call.per_token]
        assert_same_bits(compiled(*maps), model(*maps))
        graphs.append(backend.frame_count)
    assert_compiled_in_the_first_call(graphs)


@pytest.mark.parametrize("name", [name for name in OPS if name not in GRIDDED])
def test_another_size_does_not_recompile(name):
    # The option that changes shapes is the last thing a caller would notice as recompilation.
    compiled, backend = compile_once(name)
    call = make_call(name)
    assert_like_eager(name, compiled, call)
    for repeat in (2, 3):
        taller = call.map_tensors(lambda x, n=repeat: torch.cat([x] * n))
        assert_like_eager(name, compiled, taller)
    assert backend.frame_count == 1


@pytest.mark.parametrize("name", OPS)
def test_errors_are_raised_while_tracing(name):
    compiled = torch.compile(public(name), fullgraph=True, backend="aot_eager")
    bad = SPECS[name].bad_inputs[0]
    with pytest.raises((bad.error, torch._dynamo.exc.TorchDynamoException)):
        run(compiled, bad.spoil(make_call(name)))


@per_op()
def test_inductor(name, device):
    compiled = torch.compile(public(name), fullgraph=True)
    call = make_call(name, device=device)
    exact_out, exact_grads = gradients(expected(name), call.exact())
    out, grads = gradients(compiled, call)
    # A graph may compute torch's own products otherwise, but not our kernels.
    assert_same(name, "batch_invariance", call, out, run(public(name), call))
    assert_close(SPECS[name], call, out, exact_out)
    assert_gradients_close(SPECS[name], call, grads, exact_grads)
