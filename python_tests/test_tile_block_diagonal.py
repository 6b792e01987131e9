# SPDX-License-Identifier: Apache-2.0
"""What is true of tile_block_diagonal alone. Copies are exact, so is every comparison here."""

import pytest
import torch
from battery.marks import native_only

from uhd_ops import tile_block_diagonal

needs_kernels = native_only("checks the native library's own guard")


@pytest.mark.parametrize("tiles", [1, 2, 4, 9])
@pytest.mark.parametrize("shape", [(3, 5), (1, 17), (6, 1)])
def test_equals_block_diag(shape, tiles):
    weight = torch.randn(shape)
    assert torch.equal(tile_block_diagonal(weight, tiles), torch.block_diag(*[weight] * tiles))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_weight(shape):
    assert tile_block_diagonal(torch.randn(shape), 4).shape == (4 * shape[0], 4 * shape[1])


def test_applies_the_weight_to_each_token():
    # Small integers: no product or sum here is rounded.
    weight = torch.randint(-9, 10, (3, 5)).float()
    tokens = torch.randint(-9, 10, (7, 4, 5)).float()
    merged = tokens.flatten(1) @ tile_block_diagonal(weight, 4).T
    assert torch.equal(merged.unflatten(1, (4, 3)), tokens @ weight.T)


def test_gradient_is_the_sum_of_the_diagonal_blocks():
    weight = torch.zeros(2, 3, requires_grad=True)
    grad_out = torch.full((8, 12), float("nan"))  # nothing off the diagonal is read
    for tile in range(4):
        grad_out[2 * tile : 2 * tile + 2, 3 * tile : 3 * tile + 3] = 10.0**tile
    tile_block_diagonal(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, torch.full((2, 3), 1111.0))


def test_half_gradients_add_up_in_float32():
    # One at a time in bfloat16, 256 + 1 + 1 + 1 would stay at 256; 259 rounds to 260 at the store.
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad_out = torch.diag(torch.tensor([256.0, 1, 1, 1], dtype=torch.bfloat16))
    tile_block_diagonal(weight, 4).backward(grad_out)
    assert weight.grad.item() == 260


def test_second_derivative():
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: tile_block_diagonal(w, 3), (weight,))


@needs_kernels
def test_absurd_tiles_allocate_nothing():
    # 2**62 * 4 wraps around to 0 in 64 bits.
    with pytest.raises(ValueError, match="tiles must be at most 2147483647"):
        tile_block_diagonal(torch.zeros(4, 4), 2**62)
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        torch.ops.uhd_ops.tile_block_diagonal(torch.zeros(4, 4), 2**62)
