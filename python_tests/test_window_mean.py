# SPDX-License-Identifier: Apache-2.0
"""What is true of window_mean alone."""

import pytest
import torch
from battery import ISAS, assert_same_bits, using_isa
from battery.marks import native_only
from torch.nn import functional

from uhd_ops import pixel_unshuffle_mlp, window_mean, window_pool

kernels_only = native_only("the definitions add as torch does")


def test_ragged_windows_average_the_tokens_present():
    x = torch.arange(15.0)[:, None]
    expected = [
        (0 + 1 + 5 + 6) / 4,
        (2 + 3 + 7 + 8) / 4,
        (4 + 9) / 2,
        (10 + 11) / 2,
        (12 + 13) / 2,
        14,
    ]
    assert window_mean(x, (3, 5)).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("height", "width", "window"), [(4, 6, 2), (5, 3, 2), (7, 8, 3), (2, 2, 5), (1, 9, 4)]
)
def test_equals_average_pooling(height, width, window):
    # avg_pool2d with ceil_mode divides by the elements that lie inside the image. Either side adds
    # up to k = window**2 tokens and divides; each step errs by half an epsilon of the largest one.
    x = torch.randn(height * width, 6, dtype=torch.float64)
    image = x.T.reshape(1, 6, height, width)
    expected = functional.avg_pool2d(image, window, ceil_mode=True)[0].flatten(1).T
    bound = window**2 * torch.finfo(x.dtype).eps * x.abs().max()
    assert (window_mean(x, (height, width), window) - expected).abs().max() <= bound


def drift_of(call, value=0.1):
    """By how many half units in the last place a large window of equal tokens is off, relatively.

    Each of 4 levels adds 31 terms of one sign to a first one, each addition off by half a unit. Of
    so many terms, some are left at every level.
    """
    x = torch.full((1000 * 1001, 2), value)
    exact = x[0, 0].double()
    return ((call(x, (1000, 1001)).double() - exact).abs().max() / exact * 2**24).item()


@kernels_only
@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_large_windows_do_not_drift(isa):
    def pool(x, grids):
        return window_pool(x, torch.zeros_like(x), grids, 1001)

    def merged(x, grids):
        layer = torch.zeros(1, 2), None, torch.zeros(2, 1), None
        return pixel_unshuffle_mlp(x, grids, *layer, factor=1001)

    with using_isa(isa):
        # And the division.
        assert drift_of(lambda x, grids: window_mean(x, grids, 1001)) <= 4 * 31 + 1
        assert drift_of(merged) <= 4 * 31 + 1
        assert drift_of(pool) <= 2 * 4 * 31 + 1  # of the weights too, which are equal


@pytest.mark.parametrize("isa", ISAS)
def test_ties_round_to_even(isa):
    for dtype in (torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        even, odd = torch.full((2, 20), 1.0, dtype=dtype), torch.full((2, 20), 1 + eps, dtype=dtype)
        even[1], odd[1] = 1 + eps, 1 + 2 * eps  # the mean is in the middle
        with using_isa(isa):
            assert window_mean(even, (2, 1)).eq(1).all()
            assert window_mean(odd, (2, 1)).eq(1 + 2 * eps).all()


@pytest.mark.parametrize("isa", ISAS)
def test_views_without_tokens_side_by_side(isa):
    x = torch.randn(9, 20)
    with using_isa(isa):
        out = window_mean(x, [(0, 0), (0, 3), (2, 2), (4, 0), (0, 0), (0, 7), (1, 5), (0, 1)])
        assert_same_bits(out, window_mean(x, [(2, 2), (1, 5)]))


def test_gradient_is_shared_by_the_tokens_present():
    x = torch.zeros(9, 1, requires_grad=True)
    window_mean(x, (3, 3)).backward(torch.tensor([[4.0], [6.0], [8.0], [10.0]]))
    expected = [[1.0, 1, 3], [1, 1, 3], [4, 4, 10]]
    assert x.grad.view(3, 3).tolist() == expected


def test_window_of_one_is_the_identity():
    x = torch.randn(23, 5)
    assert torch.equal(window_mean(x, [(3, 5), (2, 4)], 1), x)


def test_large_halves_do_not_overflow_on_the_way():
    x = torch.full((4, 3), 65504.0, dtype=torch.float16)  # the largest float16
    assert torch.equal(window_mean(x, (2, 2)), x[:1])


def test_windows_beyond_32_bits_are_refused():
    x = torch.randn(15, 2)
    assert_same_bits(window_mean(x, (3, 5), 2**31 - 1), window_mean(x, (3, 5), 5))
    with pytest.raises(ValueError, match=r"^window must be at most 2147483647, got 2147483648$"):
        window_mean(x, (3, 5), 2**31)
