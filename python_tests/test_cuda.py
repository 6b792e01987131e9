# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can get wrong: streams, waiting, neighbours in a tile, several devices."""

import pytest
import torch
from battery import GRIDS, NATIVE, assert_same_bits, gradients, make_call, public, run
from specs import SPECS

import uhd_ops

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


@pytest.mark.parametrize("name", NATIVE)
def test_no_call_waits_for_the_device(name):
    call = make_call(name, torch.bfloat16, device="cuda")
    gradients(public(name), call)  # the first call copies its tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(public(name), call, torch.ones_like(run(public(name), call)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
