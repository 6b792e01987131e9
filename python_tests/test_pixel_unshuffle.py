# SPDX-License-Identifier: Apache-2.0
"""What is true of pixel_unshuffle alone. Copies are exact, so is every comparison here."""

import pytest
import torch
from battery.marks import native_only
from torch.nn import functional

from uhd_ops import PackedGrids, pixel_unshuffle, window_mean

needs_kernels = native_only("checks the native library's own guard")


def image_of(x, height, width):
    """``(h*w, C)`` to ``(C, h, w)``."""
    return x.unflatten(0, (height, width)).permute(2, 0, 1)


def patch_major(channel_major, factor):
    """Torch's ``(C*f*f, H, W)`` with channel index ``c * f*f + slot`` to ``(H*W, f*f*C)``."""
    x = channel_major.unflatten(0, (-1, factor**2))  # (C, f*f, H, W)
    return x.permute(2, 3, 1, 0).flatten(2).flatten(0, 1)


@pytest.mark.parametrize(("height", "width", "factor"), [(4, 6, 2), (6, 3, 3), (5, 10, 5)])
def test_equals_torch_up_to_the_order_of_channels(height, width, factor):
    x = torch.randn(height * width, 5)
    expected = functional.pixel_unshuffle(image_of(x, height, width), factor)
    assert torch.equal(pixel_unshuffle(x, (height, width), factor), patch_major(expected, factor))


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(3, 5, 2), (1, 1, 2), (1, 6, 4), (7, 5, 3), (2, 2, 5)]
)
def test_ragged_equals_replicate_padding(height, width, factor):
    x = torch.randn(height * width, 3)
    margin = (0, -width % factor, 0, -height % factor)
    padded = functional.pad(image_of(x, height, width)[None], margin, mode="replicate")[0]
    expected = patch_major(functional.pixel_unshuffle(padded, factor), factor)
    assert torch.equal(pixel_unshuffle(x, (height, width), factor), expected)


def test_gradient_of_a_token_counts_its_slots():
    x = torch.zeros(3 * 5, 1, requires_grad=True)
    pixel_unshuffle(x, (3, 5), 4).sum().backward()
    rows, cols = torch.tensor([1, 1, 2]), torch.tensor([1, 1, 1, 1, 4])
    assert torch.equal(x.grad.view(3, 5), (rows[:, None] * cols).float())


def test_half_gradients_add_up_in_float32():
    # One at a time in bfloat16, 256 + 1 + 1 + 1 would stay at 256; 259 rounds to 260 at the store.
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    pixel_unshuffle(x, (1, 1)).backward(torch.tensor([[256.0, 1, 1, 1]], dtype=torch.bfloat16))
    assert x.grad.item() == 260


def test_mean_over_the_slots_is_the_mean_over_the_tokens_present():
    # True of 2 x 2 windows only. Small integers: no sum here is rounded.
    grids = PackedGrids([(3, 5), (4, 1), (1, 1)])
    x = torch.randint(-99, 100, (grids.num_tokens, 7)).float()
    slots = pixel_unshuffle(x, grids).unflatten(1, (4, 7))
    assert torch.equal(slots.mean(1), window_mean(x, grids))


@needs_kernels
@pytest.mark.parametrize("factor", [2**31, 2**32, 2**62])
def test_absurd_factor_allocates_nothing(factor):
    # factor**2 * 4 wraps around to 0 in 64 bits.
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="factor must be at most 2147483647"):
        pixel_unshuffle(x, (2, 2), factor)
    views = PackedGrids([(2, 2)]).view_table(factor, x.device)
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        torch.ops.uhd_ops.pixel_unshuffle(x, views, factor, 1)
