# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU: the same numbers as elsewhere, and what only a GPU can get wrong."""

import pytest
import torch
from battery import (
    GRIDDED,
    GRIDS,
    NATIVE,
    OPS,
    assert_close,
    assert_same,
    assert_same_bits,
    expected,
    gradients,
    make_call,
    output_rows,
    per_case,
    public,
    run,
)
from battery.calls import LAYOUTS, random_like, token_rows
from specs import SPECS
from torch.autograd import gradcheck

import uhd_ops

pytestmark = pytest.mark.cuda

ALL_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
HALVES = (torch.bfloat16, torch.float16)
MANY = [(16, 16), (5, 7), (13, 11), (0, 4), (1, 9), (1, 1)]


def on_gpu(call):
    return call.map_tensors(torch.Tensor.cuda)


def gradients_on_gpu(name, call, grad_out=None):
    out, grads = gradients(
        public(name), on_gpu(call), grad_out if grad_out is None else grad_out.cuda()
    )
    return out.cpu(), {key: grad.cpu() for key, grad in grads.items()}


def check(name, call, grad_out):
    """Forward and backward against the definition in float64."""
    exact, exact_grads = gradients(
        expected(name), call.map_tensors(torch.Tensor.double), grad_out.double()
    )
    out, grads = gradients_on_gpu(name, call, grad_out)
    assert_close(SPECS[name], call, out, exact)
    for key, grad in grads.items():
        assert_close(SPECS[name], call, grad, exact_grads[key], f"gradient of argument {key!r}")


def grad_for(name, call):
    return random_like(run(expected(name), call))


@ALL_DTYPES
@per_case()
def test_values_and_gradients(name, options, dtype):
    call = make_call(name, dtype, **options)
    check(name, call, grad_for(name, call))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_memory_layouts(name, dtype, layout):
    call = make_call(name, dtype)
    grad_out = grad_for(name, call)
    exact, exact_grads = gradients(
        expected(name), call.map_tensors(torch.Tensor.double), grad_out.double()
    )
    spread = on_gpu(call).map_tensors(layout)
    out, grads = gradients(public(name), spread, layout(grad_out.cuda()))
    assert_close(SPECS[name], call, out.cpu(), exact)
    for key, grad in grads.items():
        assert_close(SPECS[name], call, grad.cpu(), exact_grads[key])


@pytest.mark.parametrize("name", NATIVE)
def test_gradcheck(name):
    call = on_gpu(make_call(name, torch.float64))
    leaves = [call.get(key).requires_grad_() for key in call.differentiable]

    def function(*tensors):
        filled = call
        for key, tensor in zip(call.differentiable, tensors, strict=True):
            filled = filled.put(key, tensor)
        return run(public(name), filled)

    assert gradcheck(function, leaves, fast_mode=True)


@per_case(NATIVE)
def test_every_element_is_written(name, options):
    call = on_gpu(make_call(name, torch.bfloat16, **options))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8, device="cuda").isnan().all()
    out, grads = gradients(public(name), call)
    assert not out.isnan().any()
    assert not any(grad.isnan().any() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_twenty_runs_beside_a_busy_stream_agree_bit_for_bit(name, dtype):
    call = on_gpu(make_call(name, dtype, grids=MANY))
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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@per_case(GRIDDED)
def test_a_view_alone_equals_the_view_in_a_batch(name, options, dtype):
    call = on_gpu(make_call(name, dtype, grids=MANY, **options))
    out = run(public(name), call)
    rows = output_rows(name, call, public(name))
    for i in range(len(MANY)):
        alone = run(public(name), call.only_view(i))
        cpu = call.only_view(i).map_tensors(torch.Tensor.cpu)
        assert_same(name, "batch_invariance", cpu, out[rows[i]].cpu(), alone.cpu(), f"view {i}")


@pytest.mark.parametrize("name", GRIDDED)
def test_a_nan_stays_in_its_view(name):
    call = on_gpu(make_call(name, torch.bfloat16, grids=MANY))
    out, rows = run(public(name), call), output_rows(name, call, public(name))
    tokens = token_rows(MANY)[1]
    for position in call.per_token:
        spoilt = call.get(position).clone()
        spoilt[tokens] = float("nan")
        spoilt_out = run(public(name), call.put(position, spoilt))
        for i in range(len(MANY)):
            if i != 1:
                assert torch.equal(spoilt_out[rows[i]].isnan(), out[rows[i]].isnan())


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
    call = on_gpu(call.map_tensors(lambda x: x * small))
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
    call = on_gpu(make_call(name, torch.bfloat16, grids=MANY))
    wanted = run(public(name), call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = call.map_tensors(lambda x: x.clone().fill_(float("nan")).copy_(x))
        out = run(public(name), late)
    stream.synchronize()
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("name", NATIVE)
def test_no_call_waits_for_the_device(name):
    call = on_gpu(make_call(name, torch.bfloat16))
    gradients(public(name), call)  # the first call copies its tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(public(name), call, torch.ones_like(run(public(name), call)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NATIVE)
def test_autocast(name):
    call = make_call(name)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        on_device = run(public(name), on_gpu(call))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on_host = run(public(name), call)
    assert on_device.dtype == on_host.dtype
    torch.testing.assert_close(on_device.cpu().float(), on_host.float(), rtol=0.05, atol=0.05)


def test_grids_and_tokens_on_different_devices_are_refused():
    x = torch.randn(39, 8)
    with pytest.raises(ValueError, match="grids must be on the CPU, got a tensor on cuda:0"):
        uhd_ops.window_mean(x.cuda(), torch.tensor(GRIDS).cuda())
    q = torch.randn(39, 2, 8)
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        uhd_ops.window_attention(q.cuda(), q, q.cuda(), GRIDS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device():
    x = torch.randn(39, 8)
    wanted = uhd_ops.window_mean(x, GRIDS)
    out = uhd_ops.window_mean(x.to("cuda:1"), GRIDS)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.cpu(), wanted)
