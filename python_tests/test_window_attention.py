# SPDX-License-Identifier: Apache-2.0
"""What is true of window_attention alone; the rest is in test_battery_*.py."""

import pytest
import torch
from battery import ISAS, assert_same_bits, using_isa
from battery.allocations import Allocations
from battery.marks import native_only
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from uhd_ops import (
    PackedGrids,
    PaddedGrids,
    reference,
    window_attention,
    window_attention_qkvpacked,
)
from uhd_ops.ops import view_attention
from uhd_ops.ops import window_attention as module
from uhd_ops.reference import _windows
from uhd_ops.windows import Windows

GRIDS = [(4, 6), (3, 5), (1, 1), (7, 2)]
TOKENS = sum(h * w for h, w in GRIDS)


def qkv(dtype=torch.float32, heads=2, head_dim=8):
    return torch.randn(TOKENS, 3, heads, head_dim, dtype=torch.float64).to(dtype).unbind(1)


def test_one_window_per_view_is_attention_inside_the_view():
    # Written with torch's own attention, view by view: nothing shared with the definition.
    q, k, v = qkv(torch.float64)
    out = window_attention(q, k, v, GRIDS, window=7)
    start = 0
    for h, w in GRIDS:
        rows = slice(start, start + h * w)
        own = [x[rows].transpose(0, 1) for x in (q, k, v)]
        wanted = functional.scaled_dot_product_attention(*own).transpose(0, 1)
        torch.testing.assert_close(out[rows], wanted, rtol=1e-12, atol=1e-12)
        start += h * w


def test_a_window_larger_than_every_view_needs_no_more_memory():
    q, k, v = (x.requires_grad_() for x in qkv())
    wanted = window_attention(q, k, v, GRIDS, window=7)
    grads = torch.autograd.grad(wanted.sum(), (q, k, v))
    out = window_attention(q, k, v, GRIDS, window=2**31 - 1)  # squared, it would be 2**62 tokens
    assert_same_bits(out, wanted)
    for grad, same in zip(torch.autograd.grad(out.sum(), (q, k, v)), grads, strict=True):
        assert_same_bits(grad, same)


def test_full_windows_are_a_permuted_attention():
    q, k, v = (x[:24] for x in qkv(torch.float64))

    def windows(x):  # (h*w, H, D) -> (M, H, 4, D)
        return x.view(2, 2, 3, 2, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(6, 2, 4, 8)

    wanted = functional.scaled_dot_product_attention(windows(q), windows(k), windows(v))
    torch.testing.assert_close(
        windows(window_attention(q, k, v, (4, 6))), wanted, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
def test_window_order_is_a_permutation_of_raster_order(window):
    q, k, v = qkv()
    raster = window_attention(q, k, v, GRIDS, window)
    tokens, present = _windows.window_tokens(GRIDS, window)
    permuted = window_attention(q, k, v, GRIDS, window, order="window")
    assert_same_bits(permuted, raster[tokens[present]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_window_of_one_token_copies_v(isa, dtype):
    q, k, v = qkv(dtype)
    with using_isa(isa):
        assert_same_bits(window_attention(q, k, v, GRIDS, window=1), v.contiguous())


@pytest.mark.parametrize("window", [2, 3])
def test_equal_keys_average_the_values(window):
    q, _, v = qkv(torch.float64)
    out = window_attention(q, torch.ones_like(q), v, GRIDS, window)
    tokens, present = _windows.window_tokens(GRIDS, window)
    masked = v[tokens].masked_fill(~present[..., None, None], 0)
    mean = masked.sum(1) / present.sum(1)[:, None, None]
    for window_mean, row, there in zip(mean, tokens, present, strict=True):
        for token in row[there]:
            torch.testing.assert_close(out[token], window_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [3, 9])
def test_a_score_of_minus_infinity_has_no_weight(isa, dtype, window):
    # Kernels take keys a few at a time: in the first ones there is nothing but -inf.
    q, k, v = (torch.randn(window**2, 1, 64, dtype=dtype) for _ in range(3))
    k[:-2] = float("-inf")
    with using_isa(isa):
        out = window_attention(q.abs(), k, v, (window, window), window)
    rest = [x[:, 0].double() for x in (q.abs(), k[-2:], v[-2:])]
    wanted = functional.scaled_dot_product_attention(*rest)
    # One rounding of the result; before it, the 64 products of a score and a few more.
    error = torch.finfo(dtype).eps + 2 * 65 * 8 * torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        error = 2 * 65 * 8 * torch.finfo(dtype).eps
    assert (out[:, 0].double() - wanted).abs().max() <= error * v.double().abs().max()


def test_scale():
    q, k, v = qkv(torch.float64)
    default = window_attention(q, k, v, GRIDS)
    assert_same_bits(window_attention(q, k, v, GRIDS, scale=8**-0.5), default)
    uniform = window_attention(q, k, v, GRIDS, scale=0)
    torch.testing.assert_close(uniform, window_attention(q * 0, k, v, GRIDS))
    negative = window_attention(q, k, v, GRIDS, scale=-0.3)
    torch.testing.assert_close(negative, window_attention(-q, k, v, GRIDS, scale=0.3))


def test_no_heads_or_no_channels():
    for shape in ((TOKENS, 0, 8), (TOKENS, 2, 0)):
        q = torch.randn(shape, requires_grad=True)
        out = window_attention(q, q, q, GRIDS)
        assert out.shape == shape
        out.sum().backward()
        assert q.grad.shape == shape


def test_slices_of_a_packed_projection_are_not_copied():
    packed = torch.randn(1024, 3, 4, 64)
    with Allocations() as allocations:
        window_attention(*packed.unbind(1), (32, 32))
    one = packed[:, 0].numel() * 4
    assert [size for size in allocations.sizes if size >= one] == [one], (
        "the result and nothing else"
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_packed_tensor_gives_the_bits_of_its_slices(isa, kv_heads, window):
    qkv = torch.randn(TOKENS, 3 + 2 * kv_heads, 8, requires_grad=True)
    grad_out = torch.randn(TOKENS, 3, 8)
    with using_isa(isa):
        separate = window_attention(*qkv.split([3, kv_heads, kv_heads], 1), GRIDS, window)
        (wanted,) = torch.autograd.grad(separate, qkv, grad_out)
        out = window_attention_qkvpacked(qkv, GRIDS, window, num_heads=3)
        (grad,) = torch.autograd.grad(out, qkv, grad_out)
        assert_same_bits(out.detach(), separate.detach())
        assert_same_bits(grad, wanted, "gradient")
        if kv_heads == 3:
            out = window_attention_qkvpacked(qkv.unflatten(1, (3, 3)), GRIDS, window)
            assert_same_bits(out.detach(), separate.detach())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [2, 3, 5, 17])
def test_shared_heads_are_repeated_heads(isa, dtype, window):
    # Bit for bit, but for the sums over the heads that share one.
    q, k, v = (torch.randn(TOKENS, heads, 72).to(dtype) for heads in (6, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(TOKENS, 6, 72).to(dtype)
    with using_isa(isa):
        out = window_attention(*leaves, GRIDS, window)
        grads = torch.autograd.grad(out, leaves, grad_out)
        repeated = [q, *(x.detach().repeat_interleave(3, 1).requires_grad_() for x in (k, v))]
        wanted = window_attention(*repeated, GRIDS, window)
        wanted_grads = torch.autograd.grad(wanted, repeated, grad_out)
    assert_same_bits(out.detach(), wanted.detach())
    if isa != "emulated":  # there, as on a GPU, another kernel adds up over heads
        assert_same_bits(grads[0], wanted_grads[0])
    for grad, each in zip(grads[1:], wanted_grads[1:], strict=True):
        each = each.double().unflatten(1, (2, 3))
        # Each of the three was rounded, and the sum is rounded once.
        allowed = torch.finfo(dtype).eps * 2 * each.abs().sum(2) + 1e-5
        assert ((grad.double() - each.sum(2)).abs() <= allowed).all()


@native_only("autograd joins the gradients of the definition")
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_packed_gradient_is_written_where_it_stays(kv_heads):
    qkv = torch.randn(1024, 4 + 2 * kv_heads, 64, requires_grad=True)
    out = window_attention_qkvpacked(qkv, (32, 32), num_heads=4)
    grad_out = torch.randn_like(out)
    with Allocations() as allocations:
        torch.autograd.grad(out, qkv, grad_out)
    whole = qkv.numel() * 4
    assert [size for size in allocations.sizes if size >= whole // 4] == [whole]


def test_autocast_takes_what_it_casts_to_one_dtype():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(q.bfloat16(), k, v, GRIDS)
        assert_same_bits(out, window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), GRIDS))
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            window_attention(q, k.double(), v, GRIDS)
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        window_attention(q.bfloat16(), k, v, GRIDS)


def test_definition_needs_no_more_memory_for_a_larger_window():
    q, k, v = qkv(torch.float64)
    wanted = reference.window_attention(q, k, v, GRIDS, 7)
    assert torch.equal(reference.window_attention(q, k, v, GRIDS, 2**31 - 1), wanted)


# ---- windows larger than 16 on CUDA: torch's own kernels, here on the CPU


@pytest.fixture
def suits_here(monkeypatch):
    """Send CPU calls where CUDA calls go; the windows of every call of torch's kernel."""
    windows = []
    attend = view_attention._attend

    def record(q, *rest):
        windows.append(tuple(q.shape[:2]))
        return attend(q, *rest)

    monkeypatch.setattr(module, "suits_torch", lambda q, window: True)
    monkeypatch.setattr(view_attention, "_attend", record)
    return windows


@pytest.mark.parametrize("order", ["raster", "window"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 2**31 - 1])
def test_window_major_is_the_definition(window, order):
    leaves = [x.clone().requires_grad_() for x in qkv(torch.float64)]
    grids = PackedGrids([(0, 3), *GRIDS, (2, 0)])
    where = Windows.of(grids, window, torch.device("cpu"))
    out = module._attend_on_torch(*leaves, where, -0.4, order == "window")
    wanted = reference.window_attention(*leaves, GRIDS, window, scale=-0.4, order=order)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for grad, exact in zip(grads, torch.autograd.grad(wanted, leaves, grad_out), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)


@native_only("without kernels the definition is called")
def test_windows_of_equal_size_share_one_call(suits_here):
    q, k, v = qkv(torch.float64)
    out = window_attention(q, k, v, GRIDS, 3)
    # (4, 6): 9 9 3 3; (3, 5): 9 6; (1, 1): 1; (7, 2): 6 6 2
    assert suits_here == [(1, 1), (1, 2), (2, 3), (3, 6), (3, 9)]
    wanted = reference.window_attention(q, k, v, GRIDS, 3)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@native_only("without kernels the definition is called")
def test_window_major_of_batched_tokens(suits_here):
    q, k, v = (x[:24].reshape(3, 8, 2, 8) for x in qkv(torch.float64))
    out = window_attention(q, k, v, (4, 2), 3)
    assert suits_here == [(3, 2), (3, 6)]
    wanted = reference.window_attention(q, k, v, (4, 2), 3)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@native_only("without kernels the definition is called")
def test_window_major_of_nothing(suits_here):
    for grids, shape in (([], (0, 2, 8)), ([(0, 4)], (0, 2, 8)), ([(2, 3)], (6, 0, 8))):
        q = torch.randn(shape, requires_grad=True)
        out = window_attention(q, q, q, grids, 17)
        assert out.shape == shape
        out.sum().backward()


@native_only("without kernels the definition is called")
def test_graphs_keep_the_operator(suits_here):
    q, k, v = qkv()
    wanted = torch.ops.uhd_ops.window_attention(
        q, k, v, PackedGrids(GRIDS).view_table(3, q.device), 3, 10, 8**-0.5, False
    )
    padded = PaddedGrids(TOKENS, len(GRIDS), windows=(3,), device="cpu")
    padded.update(GRIDS)
    assert_same_bits(window_attention(q, k, v, padded, 3), wanted)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(q, k, v, PackedGrids(GRIDS), 3), wanted)
    with FakeTensorMode() as mode:
        window_attention(*(mode.from_tensor(x) for x in (q, k, v)), GRIDS, 3)
    assert suits_here == []


def test_who_goes_to_torch():
    def suits(device, dtype, window):
        return module.suits_torch(torch.empty(2, 1, 8, dtype=dtype, device=device), window)

    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16):
            assert suits("cuda", dtype, 17)
            assert not suits("cuda", dtype, 16)
            assert not suits("cpu", dtype, 17)
        assert not suits("cuda", torch.float32, 17)
        assert not suits("cuda", torch.float64, 17)
