# SPDX-License-Identifier: Apache-2.0
"""What is true of tile_average alone."""

import pytest
import torch
from battery.marks import native_only

from uhd_ops import tile_average

needs_kernels = native_only("checks the native library's own guard")


@pytest.mark.parametrize("tiles", [1, 3, 4, 9])
@pytest.mark.parametrize("shape", [(3, 5), (1, 17), (6, 1)])
def test_equals_the_repeated_quotient(shape, tiles):
    # One correctly rounded division on either side: equal to the last bit.
    weight = torch.randn(shape)
    assert torch.equal(tile_average(weight, tiles), torch.cat([weight / tiles] * tiles, dim=1))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_weight(shape):
    assert tile_average(torch.randn(shape), 4).shape == (shape[0], 4 * shape[1])


def test_averages_the_results_of_the_tokens():
    # Small integers and a power of two: no product or sum here is rounded.
    weight = torch.randint(-9, 10, (3, 5)).float()
    tokens = torch.randint(-9, 10, (7, 4, 5)).float()
    average = tokens.flatten(1) @ tile_average(weight, 4).T
    assert torch.equal(average, (tokens @ weight.T).mean(1))


def test_gradient_is_the_average_of_the_tiles():
    weight = torch.zeros(2, 3, requires_grad=True)
    grad_out = torch.cat([torch.full((2, 3), 4.0 * value) for value in (1, 2, 3, 4)], dim=1)
    tile_average(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, torch.full((2, 3), 10.0))


def test_large_half_gradients_do_not_overflow_on_the_way():
    weight = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    grad_out = torch.full((2, 12), 65504.0, dtype=torch.float16)  # the largest float16
    tile_average(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, grad_out[:, :3])


def test_second_derivative():
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: tile_average(w, 3), (weight,))


@needs_kernels
def test_absurd_tiles_allocate_nothing():
    # 2**62 * 4 wraps around to 0 in 64 bits.
    with pytest.raises(ValueError, match="tiles must be at most 2147483647"):
        tile_average(torch.zeros(4, 4), 2**62)
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        torch.ops.uhd_ops.tile_average(torch.zeros(4, 4), 2**62)
