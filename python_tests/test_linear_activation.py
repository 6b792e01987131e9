# SPDX-License-Identifier: Apache-2.0
"""The private operators that follow a linear layer's product: bias, activation, mean over groups.

They are held against float64 formulas of their own, that keep all digits where torch's cancel.
"""

from types import SimpleNamespace

import pytest
import torch
from battery import ISAS, assert_same_bits, using_isa
from battery.activation_bounds import (
    ACTIVATIONS,
    DTYPES,
    assert_slope,
    assert_value,
    slope,
    stored,
    wide,
)
from battery.marks import native_only

from uhd_ops import _native
from uhd_ops.ops import pixel_unshuffle_mlp

pytestmark = native_only("the private operators have no other kernels")

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (7, 4), (8, 9), (72, 1), (72, 4), (320, 70), (4304, 2), (4304, 4)]


def forward(z, weight, bias, activation, group, save=True, fused=False):
    return torch.ops.uhd_ops._linear_activation(z, weight, bias, activation, group, save, fused)


def backward(grad_h, u, bias, activation, group, grad_bias=True):
    return torch.ops.uhd_ops._linear_activation_backward(
        grad_h, u, bias, activation, group, grad_bias
    )


def random_rows(width, group, dtype):
    """Gradients of h and products, more than two blocks of 64 products and no multiple of any."""
    rows = 150 // group + 1
    u, grad_h = torch.randn(rows * group, width) * 3, torch.randn(rows, width)
    return grad_h.to(dtype), u.to(dtype), torch.randn(width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_values_and_slopes(width, group, activation, dtype):
    grad_h, u, bias = random_rows(width, group, dtype)
    z, weight = torch.randn(len(u), 3).to(dtype), torch.randn(width, 3).to(dtype) * 2
    for isa in ISAS:
        with using_isa(isa):
            h, products = forward(z, weight, bias, activation, group)
            again, _ = forward(z, weight, bias, activation, group, False)
            gradients = backward(grad_h, u, bias, activation, group)
        assert_value(h, products, bias, activation, group)
        assert_same_bits(again, h, isa)
        assert_slope(*gradients, grad_h, u, bias, activation, group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 72])
@pytest.mark.parametrize("isa", ISAS)
def test_edge_values(isa, width, activation, dtype):
    edges = [-INF, INF, NAN, 30, -30, 1e-30, -1e-30, 0.0, -0.0, 1e30, -1e30, 88, -88, -10.03, -750]
    line = [*edges, *torch.linspace(-14, 14, 1001).tolist()]
    z = torch.tensor(line, dtype=torch.float64)[:, None].to(dtype)
    weight = torch.ones(width, 1, dtype=dtype)  # every output has the same products
    u = z.expand(-1, width).contiguous()
    grad_h = torch.randn(len(u), width).to(dtype)
    with using_isa(isa):
        h, products = forward(z, weight, None, activation, 1)  # a GEMM may make NaN of infinity
        gradients = backward(grad_h, u, None, activation, 1)
        grad_u, none = backward(torch.ones_like(u), u, None, activation, 1, False)
    assert_value(h, products, None, activation, 1)
    assert_slope(*gradients, grad_h, u, None, activation, 1)
    assert none.shape == (0,)
    assert (grad_u[[1, 9]] == 1).all()
    assert (grad_u[[0, 10]] == 0).all()


# CUDA kernels take the reciprocals of two neighbours in one, unless the product is too large: of
# moderate numbers always, up to its limit of 2^126 (-43.6 twice); beside the others never.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "numbers",
    [
        (-43.6, -43.0, -20.0, -6.5, -1e-3, 0.0, 0.7, 30.0),
        (-INF, INF, NAN, -750.0, -88.0, -44.0, -3.0, 1e30),
    ],
    ids=["moderate", "extreme"],
)
def test_neighbours(numbers, activation, dtype):
    pairs = torch.cartesian_prod(*2 * [torch.tensor(numbers, dtype=torch.float64)])
    weight, z = pairs.flatten()[:, None].to(dtype), torch.ones(4, 1, dtype=dtype)
    for isa in ISAS:
        with using_isa(isa):
            h, products = forward(z, weight, None, activation, 4)
        assert_value(h, products, None, activation, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_row_and_output(dtype):
    grad_h, u, bias = random_rows(72, 4, dtype)
    clean, _ = backward(grad_h, u, bias, "gelu", 4)
    u[17, 5] = NAN
    grad_u, grad_bias = backward(grad_h, u, bias, "gelu", 4)
    assert grad_u.isnan().nonzero().tolist() == [[17, 5]]
    assert grad_bias.isnan().nonzero().tolist() == [[5]]
    others = ~grad_u.isnan()
    assert_same_bits(grad_u[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "group"), [(72, 4), (4304, 1), (7, 9)])
def test_layouts_of_the_gradient(width, group, dtype):
    grad_h, u, bias = random_rows(width, group, dtype)
    expected = backward(grad_h, u, bias, "silu", group)
    padded = torch.full((len(grad_h), width + 16), NAN, dtype=dtype)
    # Rows on 16-byte addresses, beside them, and gradients with other columns in between.
    for view in (padded[:, :width], padded[:, 1 : width + 1]):
        view.copy_(grad_h)
        for actual, wanted in zip(backward(view, u, bias, "silu", group), expected, strict=True):
            assert_same_bits(actual, wanted)
    spread = torch.stack([grad_h, grad_h * NAN], 2)[..., 0]
    assert_same_bits(backward(spread, u, bias, "silu", group)[0], expected[0])
    one = grad_h[:1].expand_as(grad_h)  # all rows at one address
    actual, wanted = (backward(g, u, bias, "silu", group)[0] for g in (one, one.contiguous()))
    assert_same_bits(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_products(dtype):
    grad_h, u, bias = random_rows(72, 4, dtype)
    expected = backward(grad_h, u, bias, "gelu_tanh", 4)
    moved = torch.cat([u.new_zeros(1), u.flatten()])[1:].view_as(u)
    moved_bias = torch.cat([bias.new_zeros(1), bias])[1:]
    for tensors in ((moved, bias), (u, moved_bias)):
        for a, b in zip(backward(grad_h, *tensors, "gelu_tanh", 4), expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_misaligned_bias(activation, dtype):
    """Kernels may take neighbours together; where the bias lies must not say whether they do."""
    z, weight = (torch.randn(64, 1) * 3).to(dtype), torch.ones(72, 1, dtype=dtype)  # z, 72 times
    bias = torch.randn(72).to(dtype)
    elsewhere = torch.empty(73, dtype=dtype)[1:].copy_(bias)
    h, _ = forward(z, weight, bias, activation, 4)
    assert_same_bits(forward(z, weight, elsewhere, activation, 4)[0], h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 9])
def test_a_row_does_not_depend_on_the_others(group, dtype):
    grad_h, u, bias = random_rows(40, group, dtype)
    z, weight = u[:, :1].contiguous(), torch.ones(40, 1, dtype=dtype)
    h, _ = forward(z, weight, bias, "gelu", group)
    grad_u, _ = backward(grad_h, u, bias, "gelu", group)
    for row in (0, 1, 6, len(grad_h) - 1):
        rows = slice(row * group, (row + 1) * group)
        assert_same_bits(forward(z[rows], weight, bias, "gelu", group)[0], h[row : row + 1])
        alone, _ = backward(grad_h[row : row + 1], u[rows], bias, "gelu", group)
        assert_same_bits(alone, grad_u[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (8, 0), (0, 0)])
def test_nothing_to_do(rows, width, dtype):
    z, weight = torch.ones(rows, 3, dtype=dtype), torch.ones(width, 3, dtype=dtype)
    h, u = forward(z, weight, None, "gelu", 4)
    assert h.shape == (rows // 4, width)
    grad_u, grad_bias = backward(h, u, None, "gelu", 4)
    assert grad_u.shape == (rows, width)
    assert_same_bits(grad_bias, torch.zeros(width, dtype=wide(dtype)))


# ---- the fused mode, in which the products include the bias. On CUDA, cuBLASLt may compute it in
# one call; elsewhere, and where cuBLASLt has no kernel, a product with bias and then the kernel do.

INPUTS = 24
FUSED_SHAPES = [(72, 1), (7, 4)]


def layer(width, group, dtype):
    shapes = ((40 * group, INPUTS), (width, INPUTS), (width,))
    return [(torch.randn(shape) * 0.7).to(dtype).requires_grad_() for shape in shapes]


def fused(z, weight, bias, group, save=True):
    return forward(z, weight, bias, "gelu_tanh", group, save, True)


def eps_of(dtype):
    return torch.finfo(wide(dtype)).eps


def argument(z, weight, bias):
    """Return x = z weightᵀ + bias in float64, and the bound of its error in either mode."""
    z, weight = z.detach(), weight.detach()
    shift = torch.zeros(()) if bias is None else bias.detach()
    products = z.double() @ weight.double().mT
    x = products + shift.double()
    terms = z.double().abs() @ weight.double().abs().mT + shift.double().abs()
    # The products are rounded before the bias is added, or x after it: both are allowed for, and
    # one rounding for every term of the sum.
    return x, stored(products, z.dtype) + stored(x, z.dtype) + (INPUTS + 1) * terms * eps_of(
        z.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("width", "group"), FUSED_SHAPES)
def test_products_include_the_bias(width, group, biased, dtype):
    z, weight, bias = (tensor.detach() for tensor in layer(width, group, dtype))
    bias = bias if biased else None
    h, u = fused(z, weight, bias, group)
    x, error = argument(z, weight, bias)
    assert ((u.double() - x).abs() <= error).all()
    assert_value(h, u, None, "gelu_tanh", group)
    not_kept, none = fused(z, weight, bias, group, False)
    assert_same_bits(not_kept, h)
    assert none.shape == (0, width)
    if not biased:
        assert_same_bits(forward(z, weight, None, "gelu_tanh", group)[0], h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("mode", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(("width", "group"), FUSED_SHAPES)
def test_both_modes_have_the_gradients_of_the_layer(width, group, mode, save, dtype):
    inputs = layer(width, group, dtype)
    h, _ = forward(*inputs, "gelu_tanh", group, save, mode)
    grad_h = torch.randn(h.shape).to(dtype)
    actual = [grad.double() for grad in torch.autograd.grad(h, inputs, grad_h)]
    z, weight = (tensor.detach().double() for tensor in inputs[:2])
    x, x_error = argument(*inputs)
    share = (grad_h.double() / group).repeat_interleave(group, 0)
    grad_u = share * slope("gelu_tanh", x)
    # The second derivative is 0.8 at most, at zero. The kernel is within 11 epsilons: assert_slope.
    error = share.abs() * (0.8 * x_error + 11 * eps_of(dtype))
    ones = x.new_ones(len(x))
    expected = (grad_u @ weight, grad_u.mT @ z, grad_u.mT @ ones)
    stored_error = error + stored(grad_u, dtype)
    terms = (grad_u.abs() @ weight.abs(), grad_u.mT.abs() @ z.abs(), grad_u.mT.abs() @ ones)
    errors = (stored_error @ weight.abs(), stored_error.mT @ z.abs(), error.mT @ ones)
    for grad, wanted, inherited, sums in zip(actual, expected, errors, terms, strict=True):
        # A rounding for each of the terms, of which len(x) are the most, and one at the store.
        bound = inherited + len(x) * eps_of(dtype) * sums + stored(wanted, dtype)
        # What is within a bound is rounded too, not only what is exact.
        assert ((grad - wanted).abs() <= bound * (1 + 4 * torch.finfo(dtype).eps)).all()


def test_the_mode_reaches_the_operator(monkeypatch):
    inputs = layer(72, 1, torch.bfloat16)
    monkeypatch.setattr(pixel_unshuffle_mlp, "_fused", lambda z, activation, group: True)
    hidden = pixel_unshuffle_mlp.linear_activation(*inputs, "gelu_tanh")
    expected, _ = fused(*inputs, 1)
    assert_same_bits(hidden, expected)
    grad_h = torch.randn_like(hidden)
    pairs = (torch.autograd.grad(h, inputs, grad_h) for h in (hidden, expected))
    for a, b in zip(*pairs, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("save", [True, False])
def test_fake_and_autograd(save):
    torch.library.opcheck(
        torch.ops.uhd_ops._linear_activation.default,
        (*layer(8, 1, torch.float32), "gelu_tanh", 1, save, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_what_is_fused(monkeypatch):
    def is_fused(dtype=torch.bfloat16, activation="gelu_tanh", group=1, is_cuda=True):
        z = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        return pixel_unshuffle_mlp._fused(z, activation, group)

    monkeypatch.setattr(_native, "cublaslt_enabled", False)
    assert not is_fused()
    monkeypatch.setattr(_native, "cublaslt_enabled", True)
    assert is_fused()
    assert is_fused(torch.float16)
    others = ({"dtype": torch.float32}, {"activation": "gelu"}, {"group": 4}, {"is_cuda": False})
    assert not any(is_fused(**other) for other in others)
