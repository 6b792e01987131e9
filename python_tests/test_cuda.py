# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can get wrong: streams, waiting, neighbours in a tile, graphs, large sizes."""

import contextlib

import pytest
import torch
from battery import (
    GRIDS,
    NATIVE,
    assert_close,
    assert_same_bits,
    gradients,
    make_call,
    public,
    run,
)
from specs import SPECS

import uhd_ops
from uhd_ops import PackedGrids, PaddedGrids

pytestmark = pytest.mark.cuda

MANY = [(16, 16), (5, 7), (13, 11), (0, 4), (1, 9), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_twenty_runs_beside_a_busy_stream_agree_bit_for_bit(name, dtype):
    call = make_call(name, dtype, MANY, device="cuda")
    wanted_out, wanted_grads = gradients(public(name), call)
    busy, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(busy):
        for _ in range(200):
            matrix = (matrix @ matrix).clamp(-1, 1)
    for _ in range(20):
        out, grads = gradients(public(name), call)
        assert_same_bits(out, wanted_out)
        assert_same_bits(grads, wanted_grads, "gradient")
    torch.cuda.synchronize()


@pytest.mark.parametrize("side", [1, 2, 8])
@pytest.mark.parametrize(
    ("dtype", "small", "huge"),
    [(torch.bfloat16, 1e-20, 1e38), (torch.float16, 6e-5, 6e4)],
    ids=str,
)
def test_a_huge_neighbour_changes_no_bit(dtype, small, huge, side):
    # Windows of one view share a tile of the tensor cores, which align a sum to its largest term.
    call = SPECS["window_attention"].make(
        [(side, 4 * side)],
        dtype,
        heads=2,
        head_dim=72,
        window=side,
        order="window",
        generator=torch.Generator().manual_seed(0),
    )
    call = call.map_tensors(lambda x: x * small).to("cuda")
    quiet = run(public("window_attention"), call)
    beside = torch.zeros(4 * side, dtype=torch.bool, device="cuda")
    beside[:side] = True  # columns of the first window
    beside = beside.repeat(side)
    for position in range(3):
        loud = call.get(position).clone()
        loud[beside] = huge
        out = run(public("window_attention"), call.put(position, loud))
        assert_same_bits(out[side**2 :], quiet[side**2 :], f"argument {position}")


@pytest.mark.parametrize("name", NATIVE)
def test_on_a_stream_of_its_own(name):
    call = make_call(name, torch.bfloat16, MANY, device="cuda")
    wanted = run(public(name), call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = call.map_tensors(lambda x: x.clone().fill_(float("nan")).copy_(x))
        out = run(public(name), late)
    stream.synchronize()
    assert_same_bits(out, wanted)


@contextlib.contextmanager
def without_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NATIVE)
def test_no_call_waits_for_the_device(name):
    call = make_call(name, torch.bfloat16, device="cuda")
    gradients(public(name), call)  # libraries may wait when they are used first
    uhd_ops.clear_caches()  # the tables of the grids are made and copied again
    with without_waiting():
        gradients(public(name), call, torch.ones_like(run(public(name), call)))


def still_running(call):
    """What a call returns, which must not wait for what has been queued before."""
    torch.cuda._sleep(200_000_000)  # about a tenth of a second
    before = torch.cuda.Event()
    before.record()
    with without_waiting():
        out = call()
    assert not before.query()
    return out


@pytest.mark.parametrize("order", ["raster", "block"])
def test_new_grids_are_queued_behind_what_runs(order):
    x = torch.randn(4000, 64, device="cuda")
    uhd_ops.window_mean(x[:30], [(5, 6)], order_in=order)  # loads the library
    spare = [torch.empty(4096, pin_memory=True) for _ in range(8)]
    del spare  # torch keeps it; to allocate more of it may wait for the device
    for width in range(31, 39):
        pairs = [(16, width), (3, width)]
        some = x[: 19 * width]
        out = still_running(lambda: uhd_ops.window_mean(some, pairs, order_in=order))  # noqa: B023
        assert_same_bits(out, uhd_ops.window_mean(some, pairs, order_in=order))
        on_cpu = uhd_ops.window_mean(some.cpu(), pairs, order_in=order)
        torch.testing.assert_close(out.cpu(), on_cpu)


def test_another_stream_uses_tables_that_are_still_on_their_way():
    x = torch.randn(39, 64, device="cuda")
    wanted = uhd_ops.window_mean(x, GRIDS, order_in="block")
    uhd_ops.clear_caches()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        still_running(lambda: uhd_ops.window_mean(x, GRIDS, order_in="block"))
    with torch.cuda.stream(second):
        out = uhd_ops.window_mean(x, GRIDS, order_in="block")
        uhd_ops.clear_caches()  # the tables' memory goes back while both streams are busy
    with torch.cuda.stream(first):
        rubbish = [torch.full((39, 4), -1, device="cuda") for _ in range(50)]
    torch.cuda.synchronize()
    assert_same_bits(out, wanted)
    assert len(rubbish) == 50


def test_new_grids_while_a_graph_is_captured():
    x = torch.randn(8 * 45, 64, device="cuda")

    def refused(call):
        message = "is not on cuda:0 yet: make the same call once before capturing"

        def capture():
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.ones(1, device="cuda")  # torch warns of an empty graph
                call()

        with pytest.raises(NotImplementedError, match=message):
            capture()

    refused(lambda: uhd_ops.window_mean(x, [(8, 45)]))
    graph, out = captured(lambda: uhd_ops.window_mean(x, [(8, 45)]))
    uhd_ops.clear_caches()
    graph.replay()
    assert_same_bits(out, uhd_ops.window_mean(x, [(8, 45)]))
    grids = PaddedGrids(64, 4, device="cuda")
    refused(lambda: grids.update([(4, 6)]))
    assert list(grids.current) == []


@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_a_compiled_function_keeps_its_cuda_graph():
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = torch.compile(uhd_ops.window_mean, mode="reduce-overhead", fullgraph=True)
    for pairs in BATCHES * 3:
        grids = PackedGrids(pairs).to("cuda")
        x = torch.randn(grids.num_tokens, 64, device="cuda")
        torch.testing.assert_close(compiled(x, grids), uhd_ops.window_mean(x, grids))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_grids_and_tokens_on_different_devices_are_refused():
    x = torch.randn(39, 8)
    with pytest.raises(ValueError, match="grids must be on the CPU, got a tensor on cuda:0"):
        uhd_ops.window_mean(x.cuda(), torch.tensor(GRIDS).cuda())
    q = torch.randn(39, 2, 8)
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        uhd_ops.window_attention(q.cuda(), q, q.cuda(), GRIDS)


@pytest.mark.parametrize("window", [2, 8, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_is_that_of_the_cpu(dtype, window):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in MANY)
    qkv = torch.randn(tokens, 3, 2, 72, generator=generator).to(dtype)
    angles = torch.randn(tokens, 72, generator=generator)
    rotary, grad_out = (angles.cos(), angles.sin()), torch.randn(tokens, 2, 72, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaf = qkv.to(device).requires_grad_()
        tables = tuple(table.to(device) for table in rotary)
        out = uhd_ops.window_attention_qkvpacked(leaf, MANY, window, rotary=tables)
        (grad,) = torch.autograd.grad(out, leaf, grad_out.to(out))
        results.append((out.detach().cpu().double(), grad.cpu().double()))
    # Rotated queries and keys are rounded on CUDA: a score is off by 2 sqrt(D) half epsilons, and
    # so is a probability; results and gradients are rounded twice on either side.
    allowed = (2 * 72**0.5 + 4) * torch.finfo(dtype).eps
    for here, there in zip(*results, strict=True):
        assert (here - there).abs().max() <= allowed * here.abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device():
    x = torch.randn(39, 8)
    wanted = uhd_ops.window_mean(x, GRIDS)
    out = uhd_ops.window_mean(x.to("cuda:1"), GRIDS)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.cpu(), wanted)


# ---- CUDA graphs, very many windows, offsets beyond 32 bits ------------------------------------

GRIDDED_KERNELS = ["pixel_unshuffle", "pixel_unshuffle_mlp"]
GRIDDED_KERNELS += ["window_attention", "window_attention_qkvpacked", "window_mean", "window_pool"]
BATCHES = [[(4, 6), (3, 5)], [(8, 8)], [(1, 1), (0, 3), (6, 9)], [(2, 2)] * 4]
MAX_TOKENS, MAX_VIEWS = 80, 6


def captured(function, warm_up=3):
    """Capture one call in a CUDA graph; return the graph and what the call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRIDDED_KERNELS)
def test_one_graph_serves_other_tokens(name, dtype):
    call = make_call(name, dtype).to("cuda")
    graph, out = captured(lambda: run(public(name), call))
    for seed in range(3):
        fresh = make_call(name, dtype, seed=seed).to("cuda")
        for position in call.per_token:
            call.get(position).copy_(fresh.get(position))
        graph.replay()
        assert_same_bits(out, run(public(name), call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRIDDED_KERNELS)
def test_one_graph_serves_other_grids(name, dtype):
    """Forward and backward are captured once; then the grids change between replays."""
    grids = PaddedGrids(MAX_TOKENS, MAX_VIEWS, device="cuda")
    call = make_call(name, dtype, [(MAX_TOKENS, 1)]).to("cuda")
    call = call.put(call.grids, grids)
    leaves = [call.get(key).requires_grad_() for key in call.differentiable]
    grids.update(BATCHES[0])

    def step():
        out = run(public(name), call)
        return out, torch.autograd.grad(out, leaves, grad_out)

    grad_out = torch.ones_like(run(public(name), call))
    graph, (out, grads) = captured(step)
    for batch in BATCHES:
        grids.update(batch)
        graph.replay()
        wanted, wanted_grads = step()
        assert_same_bits(out.detach(), wanted.detach(), str(batch))
        for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
            assert_same_bits(grad, wanted_grad, str(batch))
        exact_grids = PackedGrids(batch)
        exact = call.put(call.grids, exact_grids)
        for position in call.per_token:
            exact = exact.put(position, call.get(position)[: exact_grids.num_tokens].detach())
        rows = run(public(name), exact)
        torch.testing.assert_close(out[: len(rows)], rows)
        assert not out[len(rows) :].any()


def test_200_000_windows():
    # More than a grid dimension but x may have (65 535), in views of every kind.
    grids = PackedGrids([(400, 400), (1, 1), (801, 997)])
    assert grids.num_windows(2) > 200_000
    generator = torch.Generator().manual_seed(0)
    call = SPECS["window_attention"].make(
        list(grids), torch.bfloat16, heads=1, head_dim=64, generator=generator
    )
    on_device = call.to("cuda").put(3, grids)
    out = run(uhd_ops.window_attention, on_device).cpu()
    exact = run(SPECS["window_attention"].reference, call.exact())
    assert_close(SPECS["window_attention"], call, out, exact)


def test_offsets_beyond_32_bits():
    """One packed projection of more than 2^31 elements; sampled rows of windows are compared."""
    heads, dim, height = 16, 72, 2
    width = 2 * (((1 << 31) // (3 * heads * dim) // height) // 2 + 8)
    tokens = height * width
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * tokens * heads * dim * 2:
        pytest.skip("needs 13 GB of free device memory")
    qkv = torch.empty(tokens, 3, heads, dim, dtype=torch.float16, device="cuda")
    assert qkv.numel() > 1 << 31
    for part in qkv.split(1 << 14):
        part.normal_()
    out = uhd_ops.window_attention(*qkv.unbind(1), [(height, width)])
    grad = torch.ones((), dtype=torch.float16, device="cuda").expand(tokens, heads, dim)
    leaves = [x.requires_grad_() for x in (qkv[:, i].detach() for i in range(3))]
    grads = torch.autograd.grad(uhd_ops.window_attention(*leaves, [(height, width)]), leaves, grad)
    for column in (0, width // 4 * 2, width - 8):
        rows = torch.cat([torch.arange(column, column + 8) + i * width for i in range(height)])
        sample = [qkv[rows.cuda(), i].detach().clone().requires_grad_() for i in range(3)]
        wanted = uhd_ops.window_attention(*sample, [(height, 8)])
        assert_same_bits(out[rows.cuda()], wanted.detach())
        wanted_grads = torch.autograd.grad(wanted, sample, grad[: len(rows)])
        for actual, wanted_grad in zip(grads, wanted_grads, strict=True):
            assert_same_bits(actual[rows.cuda()], wanted_grad)


@pytest.mark.parametrize("name", ["window_mean", "pixel_unshuffle"])
def test_rows_beyond_32_bits(name):
    channels, height = 1024, 2
    width = 2 * (((1 << 31) // channels // height) // 2 + 8)
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * height * width * channels * 2:
        pytest.skip("needs 17 GB of free device memory")
    x = torch.empty(height * width, channels, dtype=torch.float16, device="cuda")
    for part in x.split(1 << 16):
        part.normal_()
    out = getattr(uhd_ops, name)(x, [(height, width)])
    for column in (0, width - 8):
        rows = torch.cat([torch.arange(column, column + 8) + i * width for i in range(height)])
        wanted = getattr(uhd_ops, name)(x[rows.cuda()], [(height, 8)])
        assert_same_bits(out[column // 2 : column // 2 + 4], wanted)


@pytest.mark.parametrize("order", ["raster", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_windows_of_more_than_256_tokens(dtype, order):
    spec = SPECS["window_attention"]
    call = spec.make(
        [(40, 37), (20, 20), (3, 5)],
        dtype,
        heads=2,
        head_dim=72,
        window=20,
        order=order,
        generator=torch.Generator().manual_seed(0),
    )
    out = run(uhd_ops.window_attention, call.to("cuda")).cpu().double()
    exact = run(spec.reference, call.exact())
    # torch's kernels round the probabilities, which add up to one, and the result: half an epsilon
    # of the largest value each.
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * call.args[2].abs().max()
