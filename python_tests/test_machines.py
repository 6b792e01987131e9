# SPDX-License-Identifier: Apache-2.0
"""The other machines of .ci/machines.sh: which tests run on them, and what a planted product is."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from battery import assert_same_bits
from bit_comparisons import leads_to_a_comparison
from hypothesis import given, strategies


def directly(x):
    assert torch.equal(x, x)


def in_a_lambda(x):
    assert all(map(lambda y: y.equal(x), [x]))


def through_the_battery(x):
    assert_same_bits(x, x)


def through_a_helper(x):
    directly(x)


def decorated(function):
    @functools.wraps(function)
    def wrapper(x):
        function(x)

    return wrapper


class Helper:
    def check(self, x):
        directly(x)


def through_a_class(x):
    Helper().check(x)


@given(strategies.booleans())
def under_hypothesis(x):
    through_a_helper(x)


def with_a_tolerance(x):
    torch.testing.assert_close(x, x)


COMPARE = [directly, in_a_lambda, through_the_battery, through_a_helper, decorated(directly)]
COMPARE += [torch.no_grad()(directly), through_a_class, under_hypothesis]


@pytest.mark.parametrize("function", COMPARE, ids=lambda function: function.__name__)
def test_a_comparison_of_bits_is_found(function):
    assert leads_to_a_comparison(function)


@pytest.mark.parametrize("function", [with_a_tolerance, decorated(with_a_tolerance), torch.equal])
def test_nothing_else_is(function):
    assert not leads_to_a_comparison(function)


def test_this_test_is_marked(request):
    assert torch.equal(torch.ones(1), torch.ones(1))
    assert request.node.get_closest_marker("bits")


PROGRAM = """
import torch
from torch.nn import functional
from planted_products import plant

def results(x, q):
    leaves = [x.detach().requires_grad_(), q.detach().requires_grad_()]
    y = functional.layer_norm(functional.gelu(functional.linear(leaves[0], w, b)), (40,))
    z = functional.scaled_dot_product_attention(leaves[1], leaves[1], q).softmax(-1)
    out = [y, z, x.sum(1), x.mean(0), torch.einsum("nk,mk->nm", x, x)]
    out += [functional.conv1d(x[None], c)]
    return [*out, *torch.autograd.grad((y.square().mean(), z.square().mean()), leaves)]

torch.manual_seed(0)
torch.set_num_threads(1)
x, q, w, b = torch.randn(30, 24), torch.randn(1, 2, 50, 8), torch.randn(40, 24), torch.randn(40)
c = torch.randn(2, 30, 3)
spread = torch.zeros(30, 25)[:, 1:].copy_(x), torch.zeros(1, 2, 50, 9)[..., 1:].copy_(q)
exact = results(x, q)
plant()
first, again, other = results(x, q), results(x.clone(), q.clone()), results(*spread)
for i in range(len(exact)):
    assert torch.equal(first[i], again[i]), i
    torch.testing.assert_close(first[i], exact[i], rtol=1e-5, atol=1e-5)
    assert first[i].stride() == exact[i].stride(), i
print([i for i in range(len(exact)) if torch.equal(first[i], other[i])])
"""


def test_planted_products_differ_by_layout_alone():
    command = [sys.executable, "-c", PROGRAM]
    tests = Path(__file__).resolve().parent
    out = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"  # what is the same bits in both layouts
