# SPDX-License-Identifier: Apache-2.0
"""window_attention where its kernels differ: by head size, window side, element type and layout.

The CUDA kernels split windows of up to 16 tokens, of up to 256, and all others, and have a general
kernel beside the ones on tensor cores. Grids are drawn, so every raggedness meets every kernel. Run
on the CPU kernels here, and on the CUDA kernels in the emulator by .ci/emulate.sh.
"""

import os

import pytest
import torch
from battery import ISAS, assert_close, assert_same_bits, gradients, using_isa
from battery.calls import random_like, token_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from specs import SPECS, Call

import uhd_ops

SPEC = SPECS["window_attention"]
HALVES = (torch.bfloat16, torch.float16)
FAST_HEADS = (64, 72, 80, 96, 128)
# Sides on either side of each kernel's limits, with views that fill some windows and not others.
SIDES = (1, 2, 3, 4, 5, 8, 16, 17)


def grids_of_up_to(tokens):
    pairs = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5)
    return pairs.filter(lambda grids: 0 < sum(h * w for h, w in grids) <= tokens)


def make(grids, dtype, head_dim, side, order="raster", heads=2, seed=0, kv_heads=None):
    generator = torch.Generator().manual_seed(seed)
    return SPEC.make(
        list(grids),
        dtype,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=side,
        order=order,
        generator=generator,
    )


def exact_of(call, grad_out):
    return gradients(SPEC.reference, call.map_tensors(torch.Tensor.double), grad_out.double())


def check(call, what=""):
    grad_out = random_like(call.args[0])
    exact, exact_grads = exact_of(call, grad_out)
    out, grads = gradients(uhd_ops.window_attention, call, grad_out)
    assert_close(SPEC, call, out, exact, what)
    for key, grad in grads.items():
        assert_close(SPEC, call, grad, exact_grads[key], f"{what} gradient of {'qkv'[key]}")
    return out, grads


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@settings(max_examples=6)
@given(
    grids=grids_of_up_to(300),
    head_dim=st.sampled_from(FAST_HEADS),
    order=st.sampled_from(["raster", "window"]),
    kv_heads=st.sampled_from([None, 1]),
)
@example(grids=[(16, 17), (1, 1)], head_dim=72, order="window", kv_heads=1)
def test_drawn_grids(dtype, side, grids, head_dim, order, kv_heads):
    call = make(grids, dtype, head_dim, side, order, kv_heads=kv_heads)
    check(call, f"{grids}, side {side}, head {head_dim}, heads of keys {kv_heads}")


# Around the width of a vector of each instruction set, where the masked rest begins, too.
@pytest.mark.parametrize("head_dim", [*FAST_HEADS, 1, 15, 16, 17, 31, 33, 40, 73, 200, 300])
@pytest.mark.parametrize("side", [2, 5])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_every_head_size(dtype, side, head_dim):
    call = make([(5, 7), (4, 4)], dtype, head_dim, side)
    for isa in ISAS:
        with using_isa(isa):
            check(call, isa)


def packed_projection(call):
    """Q, k and v as the thirds of one tensor (N, 3, H, D), as a ViT has them."""
    qkv = torch.stack(call.args[:3], dim=1)
    return Call((*qkv.unbind(1), call.args[3]), call.kwargs, **layout_of(call))


def misaligned(call):
    """Every tensor one element after a 16-byte boundary."""

    def shift(x):
        buffer = x.new_full((x.numel() + 9,), float("nan"))
        start = 1 + (-buffer.data_ptr() // x.element_size()) % (16 // x.element_size())
        buffer[start : start + x.numel()] = x.flatten()
        return buffer[start : start + x.numel()].view(x.shape)

    return call.map_tensors(shift)


def heads_first(call):
    """Stored (H, N, D)."""
    return call.map_tensors(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))


def layout_of(call):
    return {
        "differentiable": call.differentiable,
        "per_token": call.per_token,
        "grids": call.grids,
    }


@pytest.mark.parametrize("layout", [packed_projection, misaligned, heads_first])
@pytest.mark.parametrize("side", [2, 3, 7])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layouts(dtype, side, layout):
    check(layout(make([(8, 9), (3, 3)], dtype, 72, side)), layout.__name__)


@pytest.mark.parametrize("side", [2, 3, 6])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_that_are_not_contiguous(dtype, side):
    call = make([(8, 9), (3, 3)], dtype, 64, side)
    wanted_grad = torch.ones_like(call.args[0])
    _, wanted = gradients(uhd_ops.window_attention, call, wanted_grad)
    _, expanded = gradients(
        uhd_ops.window_attention, call, wanted_grad.new_ones(1).expand(wanted_grad.shape)
    )
    assert_same_bits(expanded, wanted, "gradient")
    padded = wanted_grad.new_ones((*wanted_grad.shape[:2], 65))[..., :64]
    assert_same_bits(gradients(uhd_ops.window_attention, call, padded)[1], wanted, "gradient")


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_window_depends_on_its_own_tokens_only(dtype, side):
    # Bit for bit, wherever it lies: alone, between other views, after views without tokens.
    views = [(7, 9), (2, 2), (0, 3), (side, side), (5, 1)]
    call = make(views, dtype, 72, side, heads=3)
    grad_out = random_like(call.args[0])
    out, grads = gradients(uhd_ops.window_attention, call, grad_out)
    for i, rows in enumerate(token_rows(views)):
        alone, alone_grads = gradients(uhd_ops.window_attention, call.only_view(i), grad_out[rows])
        assert_same_bits(out[rows], alone, f"view {i}")
        for key, grad in grads.items():
            assert_same_bits(grad[rows], alone_grads[key], f"view {i}, gradient of {'qkv'[key]}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_not_finite_stays_in_its_window(dtype, side, value):
    grids = [(2 * side, 4 * side), (side + 1, side)]
    call = make(grids, dtype, 64, side, order="window")  # the tokens of a window lie together
    grad_out = random_like(call.args[0])
    finite, finite_grads = gradients(uhd_ops.window_attention, call, grad_out)
    width, token = 4 * side, side * 4 * side + side  # first token of the second row of windows
    window = 1 + token // (width * side) * 4  # its number
    inside = torch.zeros(len(finite), dtype=torch.bool)
    inside[window * side**2 : (window + 1) * side**2] = True
    in_raster = torch.zeros_like(inside)
    rows = torch.arange(side, 2 * side)[:, None] * width + torch.arange(side, 2 * side)
    in_raster[rows.flatten()] = True
    for position in range(3):
        spoilt = call.args[position].clone()
        spoilt[token, 1, 5] = value
        out, grads = gradients(uhd_ops.window_attention, call.put(position, spoilt), grad_out)
        assert_same_bits(out[~inside], finite[~inside])
        assert not out[inside].isfinite().all()
        for key, grad in grads.items():
            assert_same_bits(grad[~in_raster], finite_grads[key][~in_raster], f"gradient {key}")


@pytest.mark.parametrize("side", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unlikely_keys_have_their_gradient(dtype, side):
    # The probability of one key is below the smallest normal float16; the gradient of its value,
    # which a large gradient of the result brings back, is not.
    call = make([(side, side)], dtype, 64, side)
    q, k, v, _ = call.args
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 8
    k[5 % len(k), :, 0] = -12  # a score of -12: exp(-12) = 6e-6 of the others' weight
    call = call.put(0, q).put(1, k)
    grad_out = 500 * random_like(v)
    _, exact = exact_of(call, grad_out)
    _, grads = gradients(uhd_ops.window_attention, call, grad_out)
    rare = 5 % len(k)
    # Of this key alone: beside the others' gradients its own would count for nothing.
    assert_close(SPEC, call, grads[2][rare], exact[2][rare], "gradient of a rare value")


@pytest.mark.parametrize("side", [2, 4, 6, 16])
def test_one_hot_values_come_back_where_they_belong(side):
    # Uniform probabilities of one-hot values: each output counts exactly its window's tokens.
    grids = [(side + 1, 2 * side), (3, 2)]
    call = make(grids, torch.float16, 128, side)
    tokens = len(call.args[0])
    hot = torch.zeros(tokens, 2, 128, dtype=torch.float16)
    hot[torch.arange(tokens), :, torch.arange(tokens) % 128] = 1
    call = call.put(0, torch.zeros_like(hot)).put(2, hot)
    exact, _ = exact_of(call, hot)
    out = uhd_ops.window_attention(*call.args, **call.kwargs)
    assert torch.equal(out != 0, exact != 0)
    assert_close(SPEC, call, out, exact)


@pytest.mark.parametrize("order", ["descending", "3", "greedy", "greedy-descending"])
@pytest.mark.parametrize("side", [2, 6])
def test_the_order_of_threads_changes_nothing(side, order, monkeypatch):
    # Only the emulator reads the variable.
    call = make([(9, 7), (4, 4)], torch.bfloat16, 72, side)
    wanted = gradients(uhd_ops.window_attention, call)
    monkeypatch.setitem(os.environ, "UHD_EMULATOR_ORDER", order)
    out, grads = gradients(uhd_ops.window_attention, call)
    assert_same_bits(out, wanted[0])
    assert_same_bits(grads, wanted[1], "gradient")


@pytest.mark.parametrize("head_dim", [80, 96, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_little_shared_memory(dtype, head_dim, monkeypatch):
    # Only the emulator reads the variable: 99 KB, which k and v of 16 x 16 tokens exceed.
    call = make([(17, 21), (16, 3)], dtype, head_dim, 16)
    wanted = uhd_ops.window_attention(*call.args, **call.kwargs)
    monkeypatch.setitem(os.environ, "UHD_EMULATOR_SHARED_KB", "99")
    out, _ = check(call, "99 KB")
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("side", [2, 3])
def test_runs_of_heads(side):
    # Large calls give a warp several heads, the last warp fewer; room for many windows does too.
    grids = uhd_ops.PaddedGrids(60, 2, windows={side: 40_000}, device="cpu")
    call = make([(5, 7), (4, 5)], torch.bfloat16, 72, side, heads=6)
    wanted_grad = random_like(call.args[0])
    wanted, wanted_grads = gradients(uhd_ops.window_attention, call, wanted_grad)
    grids.update(call.args[3])
    padded = call.map_tensors(lambda x: torch.cat([x, x.new_zeros(5, *x.shape[1:])]))
    grad_out = torch.cat([wanted_grad, wanted_grad.new_zeros(5, 6, 72)])
    out, grads = gradients(uhd_ops.window_attention, padded.put(3, grids), grad_out)
    assert_same_bits(out[:55], wanted)
    for key, grad in grads.items():
        assert_same_bits(grad[:55], wanted_grads[key], f"gradient of {'qkv'[key]}")
