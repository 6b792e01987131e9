# SPDX-License-Identifier: Apache-2.0
"""Activations and their slopes in float64, and how far the private operators may be from them.

The formulas keep all digits where torch's cancel.
"""

import math

import torch
from torch import sigmoid

from battery import assert_same_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CUBE = 0.044715

# y(x) and x y'(x) of the functions x sigmoid(y).
GATES = {
    "gelu_tanh": (
        lambda x: math.sqrt(8 / math.pi) * x * (1 + CUBE * x * x),
        lambda x: math.sqrt(8 / math.pi) * x * (1 + 3 * CUBE * x * x),
    ),
    "quick_gelu": (lambda x: 1.702 * x, lambda x: 1.702 * x),
    "silu": (lambda x: x, lambda x: x),
}
ACTIVATIONS = ["gelu", "relu", *GATES]


def value(activation, x):
    if activation == "relu":
        return torch.where(x < 0, 0, x)
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return x * sigmoid(GATES[activation][0](x))


def slope(activation, x):
    if activation == "relu":
        return (x > 0).double()
    x = x.clamp(-1e3, 1e3)  # has reached its limits long before; a NaN stays
    if activation == "gelu":
        below = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        return below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    gate, x_slope = (function(x) for function in GATES[activation])
    return sigmoid(gate) + sigmoid(gate) * sigmoid(-gate) * x_slope


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def shifted(u, bias):
    """The argument of the activation: one addition in the accumulation type, then exact."""
    shift = 0 if bias is None else bias.to(wide(u.dtype))
    return (u.to(wide(u.dtype)) + shift).double()


def stored(expected, dtype):
    """One rounding to dtype."""
    info = torch.finfo(dtype)
    return (expected.abs() * info.eps + info.smallest_normal * info.eps) * 0.5


def assert_value(h, u, bias, activation, group):
    x = shifted(u, bias)
    exact = value(activation, x)
    expected = exact.unflatten(0, (-1, group)).mean(1)
    assert torch.equal(h.isnan(), expected.isnan())
    accumulate = torch.finfo(wide(h.dtype))
    # exp(a) has the relative error of its argument times |a|: four roundings, half an epsilon each.
    # The argument is at most x²/2 for erf, 2 x for the linear gates and 1.6 |x| (1 + 0.045 x²) for
    # tanh. The arithmetic around exp is within 12 epsilons; the mean adds one for every row.
    exponent = torch.maximum(x * x / 2, 1.6 * x.abs() * (1 + CUBE * x * x) + 2 * x.abs())
    error = (2 * exponent + 12 + group) * accumulate.eps * exact.abs()
    # A sigmoid below the smallest normal number may be zero.
    error = error + 2 * accumulate.smallest_normal * x.abs()
    error = torch.where(exact == 0, 0, error).unflatten(0, (-1, group)).mean(1)
    bound = stored(expected, h.dtype) * (1 + 2 * torch.finfo(h.dtype).eps) + error
    finite = expected.to(h.dtype).isfinite()
    assert_same_bits(h[~finite & ~h.isnan()], expected.to(h.dtype)[~finite & ~h.isnan()])
    assert ((h.double() - expected).abs() <= bound)[finite].all()


def assert_slope(grad_u, grad_bias, grad_h, u, bias, activation, group):
    share = (grad_h.double() / group).repeat_interleave(group, 0)
    expected = share * slope(activation, shifted(u, bias))
    assert torch.equal(grad_u.isnan(), expected.isnan())
    eps = torch.finfo(wide(u.dtype)).eps
    # The terms of a slope stay below 1.2, those that grow with an exponent a like a exp(-a) below
    # one: 8 epsilons. Three more for the share of the gradient and the product.
    error = 11 * eps * share.abs()
    bound = stored(expected, u.dtype) * (1 + 2 * torch.finfo(u.dtype).eps) + error
    finite = expected.isfinite()
    assert ((grad_u.double() - expected).abs() <= bound)[finite].all()
    # Sums of the gradients before they are rounded, one rounding for every row at most.
    sums = expected.sum(0)
    bound = error.sum(0) + len(u) * eps * expected.abs().sum(0)
    assert grad_bias.dtype == wide(u.dtype)
    assert torch.equal(grad_bias.isnan(), sums.isnan())
    finite = sums.isfinite()
    assert ((grad_bias.double() - sums).abs() <= bound)[finite].all()
