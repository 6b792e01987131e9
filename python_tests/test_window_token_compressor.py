# SPDX-License-Identifier: Apache-2.0
"""WindowTokenCompressor: what it computes, that it starts as the mean, and that it trains."""

import copy
import math

import pytest
import torch
from battery import assert_same_bits
from battery.marks import native_only
from families.case import packed_windows

import uhd_ops
from uhd_ops import PaddedGrids
from uhd_ops.nn import WindowTokenCompressor

GRIDS = [(4, 6), (3, 5), (0, 2), (1, 7)]
TOKENS = sum(h * w for h, w in GRIDS)
DIM = 12
kernels_only = native_only("padded grids, one graph for all grids, and exact bits are theirs")


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(module, x, grids):
    """Window by window, as the paper writes it: z_i = W2 GELU(W1 [x_i ; mean] + b1) + b2."""
    merged = []
    for tokens, _ in packed_windows(grids, module.window):
        rows = x[tokens]
        if module.pool == "mean":
            merged.append(rows.mean(0))
            continue
        both = torch.cat([rows, rows.mean(0, keepdim=True).expand_as(rows)], 1)
        hidden = gelu(both @ module.fc1.weight.T + module.fc1.bias)
        weights = (hidden @ module.fc2.weight.T + module.fc2.bias).softmax(0)
        merged.append((weights * rows).sum(0))
    return torch.stack(merged)


def make(seed=0, random=True, **options):
    """Return a compressor in float64; ``random``: with a last layer that is not zero."""
    torch.manual_seed(seed)
    module = WindowTokenCompressor(DIM, dtype=torch.float64, **options)
    if random:
        for parameter in module.parameters():
            parameter.data.normal_(std=0.5)
    return module


def tokens(grids=GRIDS, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    count = sum(h * w for h, w in grids)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("hidden_dim", [None, 4 * DIM, DIM // 2])
def test_equals_the_formula(window, hidden_dim):
    module, x = make(window=window, hidden_dim=hidden_dim), tokens().requires_grad_()
    leaves = [x, *module.parameters()]
    out, exact = module(x, GRIDS), by_hand(module, x, GRIDS)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    # Sums of at most 2 * DIM and 4 * DIM products of numbers below 8, a softmax of what they give,
    # and the same backwards; gradients of weights add up all tokens.
    bound = TOKENS * (6 * DIM) * 64 * torch.finfo(x.dtype).eps
    assert (out - exact).abs().max() <= bound
    wanted = torch.autograd.grad(exact, leaves, grad)
    for actual, by_formula in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        assert (actual - by_formula).abs().max() <= bound * (1 + by_formula.abs().max())


@kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [2, 3])
def test_starts_as_the_mean_bit_for_bit(window, dtype):
    module = make(random=False, window=window).to(dtype)
    assert module.fc1.weight.any()
    assert module.fc1.bias.any()
    x = tokens(dtype=dtype)
    wanted = uhd_ops.window_mean(x, GRIDS, window)
    assert_same_bits(module(x, GRIDS), wanted)
    mean = WindowTokenCompressor(DIM, pool="mean", window=window)
    assert not list(mean.parameters())
    assert_same_bits(mean(x, GRIDS), wanted)


def test_the_first_step_reaches_the_last_layer_and_the_second_the_first():
    module, x = make(random=False), tokens()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = copy.deepcopy(module.state_dict())
    target = torch.stack([x[w].amax(0) for w, _ in packed_windows(GRIDS, 2)])

    def step():
        optimizer.zero_grad()
        loss = (module(x, GRIDS) - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    # At step 0 the last layer is zero, so nothing passes through it, but it gets a gradient.
    assert module.fc2.weight.grad.abs().max() > 1e-4
    # A constant added to all logits of a window changes nothing: b2 has no gradient but rounding.
    assert module.fc2.bias.grad.abs().max() <= TOKENS * 64 * torch.finfo(x.dtype).eps
    assert not module.fc1.weight.grad.any()
    assert torch.equal(module.fc1.weight, before["fc1.weight"])
    assert not torch.equal(module.fc2.weight, before["fc2.weight"])
    second = step()
    assert module.fc1.weight.grad.abs().max() > 1e-6
    assert not torch.equal(module.fc1.weight, before["fc1.weight"])
    assert second < first
    assert step() < second


def test_both_layers_at_zero_would_never_train():
    # Why fc1 is not zero: the gradient of fc2 is a product with gelu(fc1(..)), and that is zero.
    module, x = make(random=False), tokens()
    for parameter in module.parameters():
        parameter.data.zero_()
    module(x, GRIDS).square().sum().backward()
    assert not module.fc1.weight.grad.any()
    assert not module.fc2.weight.grad.any()


def test_unshuffle_is_an_mlp_of_the_concatenated_tokens():
    module, x = make(pool="unshuffle", hidden_dim=20), tokens()
    rows = uhd_ops.reference.pixel_unshuffle(x, GRIDS)
    hidden = gelu(rows @ module.fc1.weight.T + module.fc1.bias)
    exact = hidden @ module.fc2.weight.T + module.fc2.bias
    assert (module(x, GRIDS) - exact).abs().max() <= 4 * DIM * 64 * torch.finfo(x.dtype).eps


def test_a_view_does_not_see_another():
    module, x = make(), tokens()
    out = module(x, GRIDS)
    x[24:39] = float("nan")  # the second view
    spoilt = module(x, GRIDS)
    assert spoilt[6:12].isnan().all()
    assert_same_bits(spoilt[:6], out[:6])
    assert_same_bits(spoilt[12:], out[12:])


def test_autocast_keeps_the_residual_stream():
    module, x = make().float(), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, GRIDS)
    assert out.dtype == torch.float32
    # Weights add up to one, so pooled values lie among the tokens even with rounded logits.
    for row, (window, _) in zip(out, packed_windows(GRIDS, 2), strict=True):
        slack = 8 * torch.finfo(torch.float32).eps * x[window].abs().amax(0)
        assert (row <= x[window].amax(0) + slack).all()
        assert (row >= x[window].amin(0) - slack).all()


@kernels_only
def test_padded_grids():
    module, x = make(), tokens()
    wanted = module(x, GRIDS)
    padded = PaddedGrids(60, 6, windows=(2,), device="cpu")
    padded.update(GRIDS)
    rows = x.new_zeros(60, DIM)
    rows[:TOKENS] = x
    leaves, padded_leaves = [x.requires_grad_()], [rows.requires_grad_()]
    out = module(rows, padded)
    bound = 64 * (6 * DIM) * torch.finfo(x.dtype).eps
    assert (out[: len(wanted)] - wanted).abs().max() <= bound
    assert not out[len(wanted) :].any()
    parameters = list(module.parameters())
    wanted_grads = torch.autograd.grad(module(x, GRIDS).square().sum(), leaves + parameters)
    grads = torch.autograd.grad(out.square().sum(), padded_leaves + parameters)
    assert not grads[0][TOKENS:].any()
    for actual, grad in zip((grads[0][:TOKENS], *grads[1:]), wanted_grads, strict=True):
        assert (actual - grad).abs().max() <= bound * TOKENS * (1 + grad.abs().max())


def test_its_parts_and_what_it_says():
    module = WindowTokenCompressor(DIM, hidden_dim=20, window=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "fc1.weight": (20, 2 * DIM),
        "fc1.bias": (20,),
        "fc2.weight": (DIM, 20),
        "fc2.bias": (DIM,),
    }
    assert module.extra_repr() == "dim=12, pool='adaptive', window=3"
    assert WindowTokenCompressor(DIM).fc1.out_features == DIM
