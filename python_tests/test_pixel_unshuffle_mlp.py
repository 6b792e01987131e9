# SPDX-License-Identifier: Apache-2.0
"""What is true of pixel_unshuffle_mlp and its two private operators alone."""

import pytest
import torch
from battery import ISAS, assert_same_bits, gradients, make_call
from battery.allocations import Allocations, nbytes
from battery.marks import native_only
from specs import SPECS
from torch.nn import functional

import uhd_ops
from uhd_ops.ops import pixel_unshuffle_mlp as implementation
from uhd_ops.ops.pixel_unshuffle_mlp import linear_activation, unshuffle_norm
from uhd_ops.reference.pixel_unshuffle_mlp import ACTIVATIONS
from uhd_ops.reference.pixel_unshuffle_mlp import pixel_unshuffle_mlp as definition
from uhd_ops.windows import locate

kernels_only = native_only("the private operators have no other kernels")
MANY = [(16, 16), (5, 7), (13, 11), (1, 9), (1, 1), (0, 3)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def tokens(grids, channels, dtype=torch.float32):
    return torch.randn(sum(h * w for h, w in grids), channels).to(dtype)


def norm_of(x, grids, weight=None, bias=None, factor=2):
    return unshuffle_norm(
        x, locate(x, "x", grids, factor, ("C",)), weight, bias, 1e-6, factor, True
    )


# ---- gather, LayerNorm and mean


@kernels_only
def test_statistics_survive_a_large_mean():
    # E[x²] - E[x]² in float32 would lose all digits here. The centred squares lose those of
    # x - mean: an epsilon of 1000 for every element, and some for the mean.
    x = torch.randn(16, 33) + 1000
    z, _ = norm_of(x, [(4, 4)])
    merged = uhd_ops.pixel_unshuffle(x.double(), [(4, 4)])
    expected = functional.layer_norm(merged, merged.shape[1:], eps=1e-6)
    assert (z - expected).abs().max() <= 4 * 1000 * torch.finfo(torch.float32).eps


@kernels_only
@DTYPES
def test_gradients_do_not_depend_on_the_threads(dtype):
    grids = [(30, 31), (7, 8)]  # eight blocks of windows and a rest
    tensors = tokens(grids, 16, dtype), *torch.randn(2, 64).to(dtype)
    u = torch.randn(4 * 1000, 40).to(dtype)
    bias, grad_h = torch.randn(40).to(dtype), torch.randn(1000, 40).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        z, mean = norm_of(leaves[0], grids, *leaves[1:])
        grads = torch.autograd.grad((z, mean), leaves, (z.detach().sin(), mean.detach().cos()))
        products = torch.ops.uhd_ops._linear_activation_backward(grad_h, u, bias, "gelu", 4, True)
        results.append((z.detach(), mean.detach(), *grads, *products))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@kernels_only
def test_norm_makes_no_temporaries():
    grids = [(32, 32), (31, 33)]
    x = tokens(grids, 64).requires_grad_()
    weight, bias = (torch.randn(256, requires_grad=True) for _ in range(2))
    norm_of(x, grids, weight, bias)  # the view table is made once
    with Allocations() as forward:
        z, mean = norm_of(x, grids, weight, bias)
    statistics = 2 * len(z) * 4  # mean and rstd, kept for the backward pass
    assert forward.peak <= nbytes([z, mean]) + statistics + 4096
    grad_z, grad_mean = torch.randn_like(z), torch.randn_like(mean)
    with Allocations() as backward:
        grads = torch.autograd.grad((z, mean), (x, weight, bias), (grad_z, grad_mean))
    # Two sums of f²C channels for every 32 windows, of which x holds 32 f²C; for every two windows
    # in the CUDA kernels, up to 264 blocks.
    least_windows = 2 if ISAS == ("emulated",) else 32
    assert backward.peak - nbytes(grads) <= nbytes([x]) * 2 / least_windows * 1.3


# ---- the layers


def test_layers_without_kernels_have_the_same_activations():
    x = torch.linspace(-14, 14, 2001, dtype=torch.float64)
    assert list(implementation.ACTIVATIONS) == list(ACTIVATIONS)
    for name, function in implementation.ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACTIVATIONS[name](x), rtol=1e-14, atol=1e-15)


@kernels_only
@pytest.mark.parametrize("group", [1, 4, 9])
def test_rows_in_several_blocks(group):
    # More than two blocks, the last one shorter: of 2048 rows on the CPU, 16384 in CUDA's glue.
    rows = 9 * 4 * 1000
    z, weight, bias = torch.randn(rows, 6).double(), torch.randn(5, 6).double(), torch.randn(5)
    hidden = linear_activation(z, weight, bias.double(), "gelu", group)
    expected = functional.gelu(functional.linear(z, weight, bias.double()))
    expected = expected.unflatten(0, (-1, group)).mean(1)
    # Six products and a bias, a dozen roundings in the activation, the mean over the group.
    bound = (7 + 12 + group) * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (hidden - expected).abs().max() <= bound


@kernels_only
def test_the_products_of_all_rows_are_kept_only_for_gradients():
    z, weight = torch.randn(4 * 8192, 8), torch.randn(32, 8)
    everything = len(z) * 32 * 4
    with Allocations() as inference:
        linear_activation(z, weight, None, "gelu_tanh", 4)
    assert inference.largest < everything
    with Allocations() as training:
        linear_activation(z, weight.requires_grad_(), None, "gelu_tanh", 4)
    assert training.largest == everything


@kernels_only
def test_products_that_were_not_kept_are_made_again():
    z, weight, bias = (torch.randn(s, requires_grad=True) for s in ((12, 6), (5, 6), (5,)))
    results = []
    for keep in (True, False):
        h, _ = torch.ops.uhd_ops._linear_activation(z, weight, bias, "silu", 4, keep, False)
        results.append(torch.autograd.grad(h.sum(), (z, weight, bias)))
    for a, b in zip(*results, strict=True):
        # The products are sums of six numbers, in whatever order.
        torch.testing.assert_close(a, b, rtol=0, atol=6 * 2**-23 * float(b.abs().max()))


# ---- the whole operator


def test_relu():
    # Not in the SPEC: a rounding may turn its gradient on or off. In float64 no sum is that small.
    call = make_call("pixel_unshuffle_mlp", torch.float64, activation="relu")
    out, grads = gradients(uhd_ops.pixel_unshuffle_mlp, call)
    expected, expected_grads = gradients(definition, call)
    bound = SPECS["pixel_unshuffle_mlp"].roundings(call) * 2**-52
    for actual, wanted in ((out, expected), *((grads[k], expected_grads[k]) for k in grads)):
        assert (actual - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_another_width_without_residual(form):
    call = make_call("pixel_unshuffle_mlp", torch.float64, form=form, residual=False, bias=False)
    fc2_weight = torch.cat([call.get(4)] * 2, dim=-2)
    y = uhd_ops.pixel_unshuffle_mlp(*call.args, **call.kwargs)
    wide = uhd_ops.pixel_unshuffle_mlp(*call.put(4, fc2_weight).args, **call.kwargs)
    torch.testing.assert_close(wide, torch.cat([y, y], 1), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="fc2_weight must have shape"):
        uhd_ops.pixel_unshuffle_mlp(
            *call.put(4, fc2_weight).args, **call.kwargs | {"residual": True}
        )


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_mean_is_all_that_remains_of_zero_weights(form):
    call = make_call("pixel_unshuffle_mlp", form=form)
    call = call.put(4, torch.zeros_like(call.get(4))).put(5, None)
    y = uhd_ops.pixel_unshuffle_mlp(*call.args, **call.kwargs)
    mean = uhd_ops.window_mean(call.get(0), call.get(1))
    # The definition sums in another order where the kernels are not there: a few roundings.
    torch.testing.assert_close(y, mean, rtol=0, atol=4 * 2**-23 * float(mean.abs().max()))


# ---- autocast


def mixed(form="dense", **kwargs):
    call = make_call("pixel_unshuffle_mlp", form=form, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call, uhd_ops.pixel_unshuffle_mlp(*call.args, **call.kwargs)


@kernels_only
def test_autocast_runs_the_layers_in_its_dtype_and_the_rest_in_that_of_x():
    call, y = mixed()
    x, grids, *mlp = call.args
    z, mean = norm_of(x, grids, call.get("norm_weight"), call.get("norm_bias"))
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensor.bfloat16() for tensor in mlp)
    hidden = linear_activation(z.bfloat16(), fc1_weight, fc1_bias, "gelu_tanh")
    assert_same_bits(y, functional.linear(hidden, fc2_weight, fc2_bias).float() + mean)


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_autocast_dtypes(form):
    assert mixed(form)[1].dtype == torch.float32
    call, y = mixed(form, residual=False)
    assert y.dtype == torch.bfloat16
    # Tokens from a layer that autocast ran in bfloat16 meet weights in float32.
    half = call.put(0, call.get(0).bfloat16()).put("residual", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert uhd_ops.pixel_unshuffle_mlp(*half.args, **half.kwargs).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="fc1_weight must have the dtype of x"):
        uhd_ops.pixel_unshuffle_mlp(*half.args, **half.kwargs)


def test_norm_weights_may_be_wider_than_half_tokens():
    call = make_call("pixel_unshuffle_mlp").map_tensors(torch.Tensor.bfloat16)
    weight, bias = torch.randn(2, 24).bfloat16().unbind(0)
    norm = call.put("norm_weight", weight).put("norm_bias", bias)
    wide = call.put("norm_weight", weight.float()).put("norm_bias", bias.float())
    assert_same_bits(
        uhd_ops.pixel_unshuffle_mlp(*wide.args, **wide.kwargs),
        uhd_ops.pixel_unshuffle_mlp(*norm.args, **norm.kwargs),
    )
