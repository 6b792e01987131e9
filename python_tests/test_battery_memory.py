# SPDX-License-Identifier: Apache-2.0
"""How much memory every operator allocates, counted by torch's allocators, the C++ included."""

import torch
from battery import GRIDDED, gradients, make_call, not_exempt, per_op, public, run
from battery.allocations import Allocations, nbytes, peak_of
from battery.calls import random_like
from battery.marks import native_only

pytestmark = native_only("the definition is not meant to be lean")
SMALL, LARGE = [(32, 32), (31, 33)], [(32, 32), (31, 33)] * 4


def measure(name, device, grids):
    """Return bytes of one input, and the temporaries of forward and backward at their peak."""
    call = make_call(name, grids=grids, device=device)
    for key in call.differentiable:
        call = call.put(key, call.get(key).requires_grad_())
    gradients(public(name), call)  # tables and imports are made once
    out, forward = peak_of(lambda: run(public(name), call), device)
    grad_out = random_like(out)
    leaves = [call.get(key) for key in call.differentiable]
    grads, backward = peak_of(lambda: torch.autograd.grad(out, leaves, grad_out), device)
    one_input = min(nbytes([call.get(position)]) for position in call.per_token)
    return one_input, forward - nbytes([out]), backward - nbytes(grads)


def test_the_count_sees_memory_below_python():
    x = torch.ones(1 << 20)
    with Allocations() as allocations:
        torch.ops.aten.sort(x)  # values, indices, and whatever C++ needs
    assert allocations.peak >= x.numel() * (4 + 8)
    assert allocations.largest == x.numel() * 8


@per_op(not_exempt("memory", GRIDDED))
def test_temporaries_are_smaller_than_the_input(name, device):
    one_input, forward, backward = measure(name, device, LARGE)
    assert 0 <= forward < one_input
    assert 0 <= backward < one_input


@per_op(GRIDDED)
def test_memory_is_linear_in_the_tokens(name, device):
    # Four times the tokens, four times the memory, up to the scratch space of one thread.
    _, *small = measure(name, device, SMALL)
    _, *large = measure(name, device, LARGE)
    for few, many in zip(small, large, strict=True):
        assert many <= 4 * few + (1 << 16)
