# SPDX-License-Identifier: Apache-2.0
"""What is true of tile_vector alone. Copies are exact, so is every comparison here."""

import pytest
import torch
from battery.marks import native_only

from uhd_ops import tile_vector

needs_kernels = native_only("checks the native library's own guard")


@pytest.mark.parametrize("tiles", [1, 2, 4, 9])
@pytest.mark.parametrize("size", [0, 1, 5, 1000])
def test_equals_repeat(size, tiles):
    vector = torch.randn(size)
    assert torch.equal(tile_vector(vector, tiles), vector.repeat(tiles))


def test_result_is_a_copy():
    vector = torch.zeros(3)
    tile_vector(vector, 1).fill_(1)
    assert torch.equal(vector, torch.zeros(3))


@pytest.mark.parametrize("size", [1, 5, 30000])  # the last one is shared by several threads
def test_gradient_is_the_sum_of_the_tiles(size):
    vector = torch.zeros(size, requires_grad=True)
    grad_out = torch.randint(-99, 100, (4, size)).float()
    tile_vector(vector, 4).backward(grad_out.flatten())
    assert torch.equal(vector.grad, grad_out.sum(0))


def test_half_gradients_add_up_in_float32():
    # One at a time in bfloat16, 256 + 1 + 1 + 1 would stay at 256; 259 rounds to 260 at the store.
    vector = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    tile_vector(vector, 4).backward(torch.tensor([256.0, 1, 1, 1], dtype=torch.bfloat16))
    assert vector.grad.item() == 260


def test_second_derivative():
    vector = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: tile_vector(v, 3), (vector,))


@needs_kernels
def test_absurd_tiles_allocate_nothing():
    # 2**62 * 4 wraps around to 0 in 64 bits.
    with pytest.raises(ValueError, match="tiles must be at most 2147483647"):
        tile_vector(torch.zeros(4), 2**62)
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        torch.ops.uhd_ops.tile_vector(torch.zeros(4), 2**62)
