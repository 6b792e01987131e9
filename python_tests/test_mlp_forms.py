# SPDX-License-Identifier: Apache-2.0
"""Conversions between the weight forms of the MLP are exact, or refused."""

import itertools

import pytest
import torch
from battery.marks import native_only
from specs import SPECS
from timm.models.vision_transformer import Block
from torch.utils._python_dispatch import TorchDispatchMode

import uhd_ops
from uhd_ops.nn import EarlyCompressor
from uhd_ops.nn.mlp_forms import FORMS, MlpWeights, convert_mlp, form_of

CHANNELS, HIDDEN = 5, 7


def tied_weights(dtype=torch.float32, bias=True):
    shapes = ((HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN), (CHANNELS,))
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return MlpWeights(*(tensor if bias or tensor.dim() == 2 else None for tensor in tensors))


def block_weights(factor=2):
    shapes = ((HIDDEN, CHANNELS), (HIDDEN,), (CHANNELS, HIDDEN))
    blocks = (torch.randn(factor**2, *shape) for shape in shapes)
    return MlpWeights(*blocks, torch.randn(CHANNELS))


def assert_equal(actual, wanted):
    for a, b in zip(actual, wanted, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [2, 4])
def test_tied_survives_every_round_trip(factor, dtype, bias):
    # Dividing by f² = 4 or 16 and multiplying again only moves the exponent.
    tied = tied_weights(dtype, bias)
    for path in (["block"], ["dense"], ["block", "dense"], ["dense", "block"]):
        weights = tied
        for form in path:
            weights = convert_mlp(weights, form, factor=factor)
            assert form_of(weights, factor=factor) == form
        assert_equal(convert_mlp(weights, "tied", factor=factor), tied)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_block_survives_the_round_trip_over_dense(factor):
    block = block_weights(factor)
    dense = convert_mlp(block, "dense", factor=factor)
    assert_equal(convert_mlp(dense, "block", factor=factor), block)


def test_values_land_where_they_should():
    block = block_weights()
    dense = convert_mlp(block, "dense")
    fc1 = dense.fc1_weight.view(4, HIDDEN, 4, CHANNELS)
    for p, q in itertools.product(range(4), repeat=2):
        wanted = block.fc1_weight[p] if p == q else torch.zeros(HIDDEN, CHANNELS)
        assert torch.equal(fc1[p, :, q], wanted)
        assert torch.equal(dense.fc2_weight.view(CHANNELS, 4, HIDDEN)[:, p], block.fc2_weight[p])


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reuse_initialisation_is_tied(dtype, factor):
    # What the compressor starts from: F1 four times on the diagonal, a quarter of [F2 F2 F2 F2].
    tied, patches = tied_weights(dtype), factor**2
    dense = convert_mlp(tied, "dense", factor=factor)
    assert torch.equal(dense.fc1_weight, torch.block_diag(*[tied.fc1_weight] * patches))
    assert torch.equal(dense.fc1_bias, tied.fc1_bias.repeat(patches))
    assert torch.equal(dense.fc2_weight, torch.cat([tied.fc2_weight / patches] * patches, 1))
    assert dense.fc2_bias is tied.fc2_bias
    assert_equal(
        dense, convert_mlp(convert_mlp(tied, "block", factor=factor), "dense", factor=factor)
    )


class _Modes(TorchDispatchMode):
    """Keeps the modes in which the operator behind the weight tiling is called."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.uhd_ops.tile_weight.default:
            self.modes.add(args[2])
        return function(*args, **(kwargs or {}))


@native_only("the definitions of the operators call torch")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reuse_initialisation_is_weight_tiling(device):
    with torch.device(device):
        block = Block(8, 2)
    with _Modes() as calls:
        compressor = EarlyCompressor.from_block(block)
    assert calls.modes == {"block_diagonal", "average", "repeat"}
    assert {p.device.type for p in compressor.parameters()} == {device}


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("start", ["block", "tied"])
def test_every_form_is_the_same_network(start, factor):
    x = torch.randn(39, CHANNELS, dtype=torch.float64)
    weights = tied_weights() if start == "tied" else block_weights(factor)
    weights = MlpWeights(*(tensor.double() for tensor in weights))
    results = []
    for form in FORMS[: FORMS.index(start) + 1]:
        converted = convert_mlp(weights, form, factor=factor)
        tokens = x.clone().requires_grad_()
        y = uhd_ops.pixel_unshuffle_mlp(tokens, [(4, 6), (3, 5)], *converted, factor=factor)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), tokens)))
    # The forms add the same products in another order: sums of at most f² (C + I) of them, whose
    # sizes, and those of their derivatives, the weights keep below ten times the largest result.
    eps = torch.finfo(torch.float64).eps
    for other in results[:-1]:
        for a, b in zip(other, results[-1], strict=True):
            assert (a - b).abs().max() <= 10 * factor**2 * (CHANNELS + HIDDEN) * eps * b.abs().max()


def test_conversion_is_differentiable():
    tied = MlpWeights(*(tensor.double().requires_grad_() for tensor in tied_weights()))
    leaves = tied[:3]
    dense = convert_mlp(tied, "dense")
    grads = torch.autograd.grad(sum(t.sum() for t in dense[:3]), leaves)
    # Every weight of fc1 is copied to four places, every one of fc2 to four places as a quarter.
    for grad, scale in zip(grads, (4.0, 4.0, 1.0), strict=True):
        assert torch.equal(grad, torch.full_like(grad, scale))


def test_no_conversion_returns_the_same_object():
    tied = tied_weights()
    assert convert_mlp(tied, "tied") is tied


def test_factor_one_is_dense_and_tied_at_once():
    weights = tied_weights()
    assert form_of(weights, factor=1) == "dense"
    assert convert_mlp(weights, "tied", factor=1) is weights


def test_width_of_the_result_may_differ():
    block = MlpWeights(torch.randn(4, 7, 5), None, torch.randn(4, 3, 7), torch.randn(3))
    assert form_of(block, channels=5) == "block"
    dense = convert_mlp(block, "dense", channels=5)
    assert dense.fc2_weight.shape == (3, 28)
    assert_equal(convert_mlp(dense, "block", channels=5), block)


def test_what_has_no_smaller_form_is_refused():
    block = block_weights()
    with pytest.raises(ValueError, match="no exact tied form: the patches have different blocks"):
        convert_mlp(block, "tied")
    dense = convert_mlp(tied_weights(), "dense")
    full = dense._replace(fc1_weight=torch.randn_like(dense.fc1_weight))
    for form in ("block", "tied"):
        with pytest.raises(ValueError, match="no exact block form: fc1_weight is not block-diag"):
            convert_mlp(full, form)
    odd = MlpWeights(torch.randn(6, 4 * CHANNELS), None, torch.randn(CHANNELS, 6), None)
    with pytest.raises(ValueError, match=r"\(6, 20\) does not divide into 4 diagonal blocks"):
        convert_mlp(odd, "block")


def test_bad_arguments():
    tied = tied_weights()
    with pytest.raises(ValueError, match=r'form must be "dense", "block" or "tied", got \'wide\''):
        convert_mlp(tied, "wide")
    for bad in (
        tied._replace(fc1_weight=torch.zeros(HIDDEN, 2 * CHANNELS)),
        tied._replace(fc1_weight=torch.zeros(3, HIDDEN, CHANNELS)),
        tied._replace(fc1_bias=torch.zeros(HIDDEN + 1)),
        tied._replace(fc2_weight=torch.zeros(CHANNELS, HIDDEN - 1)),
        tied._replace(fc2_bias=torch.zeros(1, CHANNELS)),
    ):
        with pytest.raises(ValueError, match="weights must be dense, block or tied for C = 5 and"):
            form_of(bad)


def test_forms_are_those_of_the_operator():
    assert set(FORMS) == set(SPECS["pixel_unshuffle_mlp"].options["form"])
