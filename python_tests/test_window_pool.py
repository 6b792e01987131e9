# SPDX-License-Identifier: Apache-2.0
"""What is true of window_pool alone."""

import math

import pytest
import torch
from battery import ISAS, assert_same_bits, gradients, make_call, using_isa
from battery.marks import native_only
from families.case import packed_windows
from specs import SPECS

from uhd_ops import window_mean, window_pool

GRIDS = [(4, 6), (3, 5), (1, 7), (0, 3), (9, 2)]
TOKENS = sum(h * w for h, w in GRIDS)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_equals_a_loop_over_windows_and_channels(window):
    call = make_call("window_pool", torch.float64, GRIDS, channels=3, window=window)
    x, logits = call.args[:2]
    # Results and gradients by the formulas: with weights a_i, y = sum a_i x_i, dy/dx_i = a_i and
    # dy/dlogit_i = a_i (x_i - y).
    wanted, rows = torch.zeros(0, 3, dtype=torch.float64), []
    grad_x, grad_logits = torch.zeros_like(x), torch.zeros_like(x)
    for row, (tokens, _) in enumerate(packed_windows(GRIDS, window)):
        rows.append(torch.zeros(3, dtype=torch.float64))
        for c in range(3):
            exponentials = [math.exp(logits[t, c].item()) for t in tokens]
            weights = [e / math.fsum(exponentials) for e in exponentials]
            pooled = math.fsum(a * x[t, c].item() for a, t in zip(weights, tokens, strict=True))
            rows[row][c] = pooled
            for a, t in zip(weights, tokens, strict=True):
                grad_x[t, c] = a
                grad_logits[t, c] = a * (x[t, c].item() - pooled)
    wanted = torch.stack(rows)
    out, grads = gradients(window_pool, call, torch.ones_like(wanted))
    # The SPEC bounds the errors of our side; the loop's are smaller.
    bound = 2 * SPECS["window_pool"].roundings(call) * 2**-52
    for actual, exact in ((out, wanted), (grads[0], grad_x), (grads[1], grad_logits)):
        assert (actual - exact).abs().max() <= bound * x.abs().max()


@native_only("the definition rounds its weights, the kernels do not round equal ones")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_equal_logits_give_the_mean_bit_for_bit(window, dtype, isa):
    x = torch.randn(TOKENS, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    with using_isa(isa):
        wanted = window_mean(x, GRIDS, window)
        for level in (0.0, 7.5, -30.0):
            logits = torch.full_like(x, level)
            assert_same_bits(window_pool(x, logits, GRIDS, window), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_gradient_of_a_lone_token_is_its_own(window, isa):
    x = torch.randn(3, 20, requires_grad=True)
    logits = torch.randn(3, 20, requires_grad=True)
    grad = torch.randn(3, 20)
    with using_isa(isa):
        window_pool(x, logits, [(1, 1)] * 3, window).backward(grad)
    assert_same_bits(x.grad, grad)
    assert_same_bits(logits.grad, torch.zeros_like(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (1, 2)], ids=str)
def test_largest_values_do_not_overflow_on_the_way(grid, isa):
    tokens = grid[0] * grid[1]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.full((tokens, 20), torch.finfo(dtype).max, dtype=dtype)
        x[0] = x[0] / 2  # one less, so that a rounding up of the others cannot reach infinity
        with using_isa(isa):
            pooled = window_pool(x, torch.zeros_like(x), grid, 3)
        assert pooled.isfinite().all()
        assert (pooled > x[0]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [2, 3])
def test_weights_that_vanish(window, isa):
    # Logits far apart, beyond what exp holds in either direction: the largest one takes all.
    x = torch.randn(15, 20)
    logits = torch.full((15, 20), -1e30)
    logits[0], logits[14] = 1e30, -1e29
    with using_isa(isa):
        out = window_pool(x, logits, (3, 5), window)
    assert_same_bits(out[0], x[0])
    assert_same_bits(out[-1], x[14])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [2, 3])
def test_infinite_logits(window, isa):
    inf = torch.inf
    x = torch.randn(window**2, 4)
    logits = torch.zeros(window**2, 4)
    logits[1:, 0] = -inf  # the first token alone has a weight
    logits[:, 1] = -inf
    logits[1, 2] = inf
    logits[1, 3] = torch.nan
    leaves = [x.requires_grad_(), logits.requires_grad_()]
    with using_isa(isa):
        out = window_pool(*leaves, (window, window), window)
        grad_x, grad_logits = torch.autograd.grad(out.sum(), leaves)
    assert out[0, 0] == x[0, 0]
    assert out[0, 1:].isnan().all()
    assert grad_x[:, 0].tolist() == [1.0] + [0.0] * (window**2 - 1)
    assert grad_logits[:, 0].tolist() == [0.0] * window**2
    assert grad_x[:, 1:].isnan().all()
    assert grad_logits[:, 1:].isnan().all()


def test_gradients_of_logits_add_up_to_zero():
    # A constant added to all logits of a window changes nothing.
    call = make_call("window_pool", torch.float64, GRIDS)
    _, grads = gradients(window_pool, call)
    bound = SPECS["window_pool"].roundings(call) * 2**-52
    for tokens, _ in packed_windows(GRIDS, 2):
        assert grads[1][tokens].sum(0).abs().max() <= 4 * bound * call.args[0].abs().max() ** 2


def test_autocast_casts_the_logits_to_the_tokens():
    call = make_call("window_pool")
    x, logits = call.args[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_pool(x, logits.bfloat16(), call.args[2])
        narrow = window_pool(x.bfloat16(), logits, call.args[2])
    assert_same_bits(out, window_pool(x, logits.bfloat16().float(), call.args[2]))
    assert_same_bits(narrow, window_pool(x.bfloat16(), logits.bfloat16(), call.args[2]))
