# SPDX-License-Identifier: Apache-2.0
"""The fused mode of a linear layer and its activation, in which the products include the bias.

On CUDA, cuBLASLt may compute it in one call. Elsewhere, and where cuBLASLt has no kernel, a product
with bias and then the kernel do, and that is what runs here.
"""

from types import SimpleNamespace

import pytest
import torch
from battery import assert_same_bits
from battery.activation_bounds import DTYPES, assert_value, slope, stored, wide
from battery.marks import native_only

from uhd_ops import _native
from uhd_ops.ops import _linear_activation

pytestmark = native_only("the private operators have no other kernels")

INPUTS = 24
SHAPES = [(72, 1), (7, 4)]


def layer(width, group, dtype):
    shapes = ((40 * group, INPUTS), (width, INPUTS), (width,))
    return [(torch.randn(shape) * 0.7).to(dtype).requires_grad_() for shape in shapes]


def forward(z, weight, bias, group, save=True, fused=True):
    return torch.ops.uhd_ops._linear_activation(z, weight, bias, "gelu_tanh", group, save, fused)


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
@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_products_include_the_bias(width, group, biased, dtype):
    z, weight, bias = (tensor.detach() for tensor in layer(width, group, dtype))
    bias = bias if biased else None
    h, u = forward(z, weight, bias, group)
    x, error = argument(z, weight, bias)
    assert ((u.double() - x).abs() <= error).all()
    assert_value(h, u, None, "gelu_tanh", group)
    not_kept, none = forward(z, weight, bias, group, save=False)
    assert_same_bits(not_kept, h)
    assert none.shape == (0, width)
    if not biased:
        assert_same_bits(forward(z, weight, None, group, fused=False)[0], h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_both_modes_have_the_gradients_of_the_layer(width, group, fused, save, dtype):
    inputs = layer(width, group, dtype)
    h, _ = forward(*inputs, group, save, fused)
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
    monkeypatch.setattr(_linear_activation, "_fused", lambda z, activation, group: True)
    hidden = _linear_activation.linear_activation(*inputs, "gelu_tanh")
    expected, _ = forward(*inputs, 1)
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
    def fused(dtype=torch.bfloat16, activation="gelu_tanh", group=1, is_cuda=True):
        z = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        return _linear_activation._fused(z, activation, group)

    monkeypatch.setattr(_native, "cublaslt_enabled", False)
    assert not fused()
    monkeypatch.setattr(_native, "cublaslt_enabled", True)
    assert fused()
    assert fused(torch.float16)
    others = ({"dtype": torch.float32}, {"activation": "gelu"}, {"group": 4}, {"is_cuda": False})
    assert not any(fused(**other) for other in others)
