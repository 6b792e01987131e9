# SPDX-License-Identifier: Apache-2.0
"""What is true of the three functions that repeat a weight alone.

Copies are exact, and so is one correctly rounded division: the comparisons are of equal numbers.
"""

import pytest
import torch
from battery.marks import native_only

from uhd_ops import tile_average, tile_block_diagonal, tile_vector

needs_kernels = native_only("checks the native library alone")
MODES = {"block_diagonal": tile_block_diagonal, "average": tile_average, "repeat": tile_vector}
MATRIX_MODES = ["block_diagonal", "average"]
# The same by torch's means.
BY_HAND = {
    "block_diagonal": lambda weight, tiles: torch.block_diag(*[weight] * tiles),
    "average": lambda weight, tiles: torch.cat([weight / tiles] * tiles, dim=1),
    "repeat": lambda vector, tiles: vector.repeat(tiles),
}
SHAPES = [("repeat", (size,)) for size in (0, 1, 5, 1000)]
SHAPES += [
    (mode, shape)
    for mode in MATRIX_MODES
    for shape in ((3, 5), (1, 17), (6, 1), (0, 3), (3, 0), (0, 0))
]


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("mode", "shape"), SHAPES)
def test_equals_the_tiles_by_hand(mode, shape, tiles):
    weight = torch.randn(shape)
    assert torch.equal(MODES[mode](weight, tiles), BY_HAND[mode](weight, tiles))


def test_block_diagonal_applies_the_weight_to_each_token():
    # Small integers: no product or sum here is rounded.
    weight = torch.randint(-9, 10, (3, 5)).float()
    tokens = torch.randint(-9, 10, (7, 4, 5)).float()
    merged = tokens.flatten(1) @ tile_block_diagonal(weight, 4).T
    assert torch.equal(merged.unflatten(1, (4, 3)), tokens @ weight.T)


def test_average_averages_the_results_of_the_tokens():
    # Small integers and a power of two: no product or sum here is rounded.
    weight = torch.randint(-9, 10, (3, 5)).float()
    tokens = torch.randint(-9, 10, (7, 4, 5)).float()
    average = tokens.flatten(1) @ tile_average(weight, 4).T
    assert torch.equal(average, (tokens @ weight.T).mean(1))


def test_block_diagonal_gradient_is_the_sum_of_the_diagonal_blocks():
    weight = torch.zeros(2, 3, requires_grad=True)
    grad_out = torch.full((8, 12), float("nan"))  # nothing off the diagonal is read
    for tile in range(4):
        grad_out[2 * tile : 2 * tile + 2, 3 * tile : 3 * tile + 3] = 10.0**tile
    tile_block_diagonal(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, torch.full((2, 3), 1111.0))


def test_average_gradient_is_the_average_of_the_tiles():
    weight = torch.zeros(2, 3, requires_grad=True)
    grad_out = torch.cat([torch.full((2, 3), 4.0 * value) for value in (1, 2, 3, 4)], dim=1)
    tile_average(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, torch.full((2, 3), 10.0))


@pytest.mark.parametrize("size", [1, 5, 30000])  # the last one is shared by several threads
def test_vector_gradient_is_the_sum_of_the_tiles(size):
    torch.set_num_threads(3)
    vector = torch.zeros(size, requires_grad=True)
    grad_out = torch.randint(-99, 100, (4, size)).float()
    tile_vector(vector, 4).backward(grad_out.flatten())
    assert torch.equal(vector.grad, grad_out.sum(0))


@pytest.mark.parametrize("shape", [(1, 30000), (301, 100)])  # threads share rows and cut them
@pytest.mark.parametrize("mode", MATRIX_MODES)
def test_matrix_gradient_is_the_sum_of_the_tiles(mode, shape):
    torch.set_num_threads(3)
    weight = torch.zeros(shape, requires_grad=True)
    tiles = torch.randint(-99, 100, (2, *shape)).float()
    grad_out = torch.block_diag(*tiles) if mode == "block_diagonal" else torch.cat([*tiles], dim=1)
    MODES[mode](weight, 2).backward(grad_out)
    wanted = tiles.mean(0) if mode == "average" else tiles.sum(0)
    assert torch.equal(weight.grad, wanted)


@pytest.mark.parametrize("mode", ["block_diagonal", "repeat"])
def test_half_gradients_add_up_wide(mode):
    # One at a time in bfloat16, 256 + 1 + 1 + 1 would stay at 256; 259 rounds to 260 at the store.
    grad_out = torch.tensor([256.0, 1, 1, 1], dtype=torch.bfloat16)
    weight = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    if mode == "block_diagonal":
        grad_out, weight = grad_out.diag(), weight.detach().view(1, 1).requires_grad_()
    MODES[mode](weight, 4).backward(grad_out)
    assert weight.grad.item() == 260


def test_large_half_gradients_do_not_overflow_on_the_way():
    weight = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    grad_out = torch.full((2, 12), 65504.0, dtype=torch.float16)  # the largest float16
    tile_average(weight, 4).backward(grad_out)
    assert torch.equal(weight.grad, grad_out[:, :3])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "tiles"), [("block_diagonal", 1000), ("average", 10**6), ("repeat", 10**6)]
)
def test_gradients_of_many_tiles_do_not_drift(mode, tiles, dtype):
    # A million times 0.1, one at a time in float32, is 100958.
    shape = (1,) if mode == "repeat" else (1, 1)
    weight = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = MODES[mode](weight, tiles)
    out.backward(torch.full_like(out, 0.1))
    term = torch.tensor(0.1, dtype=dtype).double()
    exact = term if mode == "average" else tiles * term
    # The worst of two orders. On the CPU, at most 32 terms on each of four levels, in the
    # accumulation type: each term takes part in at most 4 * 32 additions, all terms have one sign,
    # and every addition is off by half an epsilon. In CUDA's kernels one addition a tile in
    # float64, then one rounding. Either way a division and a rounding of `exact`; then the store.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    in_float64 = tiles * torch.finfo(torch.float64).eps / 2
    relative = max(4 * 32 * eps / 2, in_float64 + eps / 2) + eps
    if dtype == torch.bfloat16:
        relative += torch.finfo(dtype).eps / 2
    assert (weight.grad.double() - exact).abs().item() <= relative * exact.item()


@needs_kernels
@pytest.mark.parametrize("mode", MODES)
def test_absurd_tiles_allocate_nothing(mode):
    # 2**62 * 4 wraps around to 0 in 64 bits.
    weight = torch.zeros(4) if mode == "repeat" else torch.zeros(4, 4)
    with pytest.raises(ValueError, match="tiles must be at most 2147483647"):
        MODES[mode](weight, 2**62)
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        torch.ops.uhd_ops.tile_weight(weight, 2**62, mode)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "tiles", "mode", "message"),
    [
        ((4, 4), 2, "mirror", "unknown mode mirror"),
        ((4,), 2, "average", "weight must be a matrix, or a vector to repeat"),
        ((4, 4), 2, "repeat", "weight must be a matrix, or a vector to repeat"),
        ((4, 4), 0, "block_diagonal", "tiles at least 1"),
    ],
)
def test_operator_guards_itself(shape, tiles, mode, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.uhd_ops.tile_weight(torch.zeros(shape), tiles, mode)


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("block_diagonal", (5, 4)), ("block_diagonal", (4, 5)), ("average", (4, 5)), ("repeat", (5,))],
)
def test_backward_refuses_a_part_of_a_tile(mode, shape):
    with pytest.raises(RuntimeError, match="grad_out must hold whole tiles"):
        torch.ops.uhd_ops._tile_weight_backward(torch.zeros(shape), 2, mode)
