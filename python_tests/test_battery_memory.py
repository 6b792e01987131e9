# SPDX-License-Identifier: Apache-2.0
"""How much memory every operator allocates, counted by torch's own allocator, the C++ included."""

import pytest
import torch
from battery import GRIDDED, gradients, make_call, not_exempt, public, run
from battery.allocations import Allocations, nbytes
from battery.calls import random_like
from battery.marks import native_only

pytestmark = native_only("the definition is not meant to be lean")
SMALL, LARGE = [(32, 32), (31, 33)], [(32, 32), (31, 33)] * 4


def measure(name, grids, **options):
    """Return bytes of one input, and the temporaries of forward and backward at their peak."""
    call = make_call(name, grids=grids, **options)
    for key in call.differentiable:
        call = call.put(key, call.get(key).requires_grad_())
    gradients(public(name), call)  # tables and imports are made once
    with Allocations() as forward:
        out = run(public(name), call)
    grad_out = random_like(out)
    leaves = [call.get(key) for key in call.differentiable]
    with Allocations() as backward:
        grads = torch.autograd.grad(out, leaves, grad_out)
    one_input = min(nbytes([call.get(position)]) for position in call.per_token)
    return one_input, forward.peak - nbytes([out]), backward.peak - nbytes(grads)


def test_the_count_sees_memory_below_python():
    x = torch.ones(1 << 20)
    with Allocations() as allocations:
        torch.ops.aten.sort(x)  # values, indices, and whatever C++ needs
    assert allocations.peak >= x.numel() * (4 + 8)
    assert allocations.largest == x.numel() * 8


@pytest.mark.parametrize("name", not_exempt("memory", GRIDDED))
def test_temporaries_are_smaller_than_the_input(name):
    one_input, forward, backward = measure(name, LARGE)
    assert 0 <= forward < one_input
    assert 0 <= backward < one_input


@pytest.mark.parametrize("name", GRIDDED)
def test_memory_is_linear_in_the_tokens(name):
    # Four times the tokens, four times the memory, up to the scratch space of one thread.
    _, *small = measure(name, SMALL)
    _, *large = measure(name, LARGE)
    for few, many in zip(small, large, strict=True):
        assert many <= 4 * few + (1 << 16)
