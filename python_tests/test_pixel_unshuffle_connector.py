# SPDX-License-Identifier: Apache-2.0
"""nn.PixelUnshuffleConnector is LN, Linear, GELU, Linear on the tokens of each window."""

import copy
import functools

import pytest
import torch
from families.case import assert_close as close
from families.case import window_slots
from torch.nn import functional

from uhd_ops.nn import PixelUnshuffleConnector

GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS, DIM, OUT = 40, 16, 24
# Two products in each of up to three stages, of at most 9 * DIM terms, and their norms.
ROUNDINGS = 6 * 2 * 9 * DIM
assert_close = functools.partial(close, roundings=ROUNDINGS)
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
    "relu": functional.relu,
}


def random_connector(**options):
    connector = PixelUnshuffleConnector(DIM, OUT, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return connector


def by_hand(connector, x, grids, f=2, activation="gelu"):
    """Loop over stages, views and windows; a slot without a token takes the nearest one."""
    views = list(x.split([height * width for height, width in grids]))
    grids = list(grids)
    for stage in connector.stages:
        for index, (height, width) in enumerate(grids):
            merged = []
            for _, slots in window_slots(height, width, f):
                z = views[index][slots].flatten()
                norm = stage.norm
                z = functional.layer_norm(z, z.shape, norm.weight, norm.bias, norm.eps)
                z = ACTIVATIONS[activation](stage.fc1.weight @ z + stage.fc1.bias)
                merged.append(stage.fc2.weight @ z + stage.fc2.bias)
            views[index] = torch.stack(merged)
            grids[index] = -(-height // f), -(-width // f)
    return torch.cat(views), grids


@pytest.mark.parametrize("merger_times", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"activation": "gelu_tanh"}, {"activation": "relu", "eps": 0.1}]
)
def test_is_its_formula(merger_times, options):
    connector = random_connector(merger_times=merger_times, **options)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    options = {"f": options.get("window", 2), "activation": options.get("activation", "gelu")}
    expected, grids = by_hand(connector, x, GRIDS, **options)
    assert_close(connector(x, GRIDS), expected)
    assert list(connector.merged(GRIDS)) == grids


def test_gradients():
    connector = random_connector(merger_times=2)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(h * w for h, w in connector.merged(GRIDS)), OUT, dtype=torch.float64)
    inputs = [x, *connector.parameters()]
    actual = torch.autograd.grad((connector(x, GRIDS) * weight).sum(), inputs)
    expected = torch.autograd.grad((by_hand(connector, x, GRIDS)[0] * weight).sum(), inputs)
    largest = max(gradient.abs().max() for gradient in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        # Forward and backward pass, and the sum over the rows of all tokens.
        bound = 2 * TOKENS * ROUNDINGS * torch.finfo(torch.float64).eps * largest
        assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    connector = random_connector(dtype=dtype, merger_times=2)
    x = torch.randn(TOKENS, DIM, dtype=dtype)
    out = connector(x, GRIDS)
    assert out.dtype == dtype
    exact = by_hand(copy.deepcopy(connector).double(), x.double(), GRIDS)[0]
    # Per stage four results are rounded to the type; sums of 4 * DIM terms widen each by its root.
    bound = 2 * 4 * (4 * DIM) ** 0.5 * torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= bound


def test_names_and_shapes():
    connector = random_connector(merger_times=2)
    keys = [f"{name}.{kind}" for name in ("norm", "fc1", "fc2") for kind in ("weight", "bias")]
    assert list(connector.state_dict()) == [f"stages.{i}.{key}" for i in range(2) for key in keys]
    shapes = [tuple(stage.fc2.weight.shape) for stage in connector.stages]
    assert shapes == [(DIM, 4 * DIM), (OUT, 4 * DIM)]
    assert "merger_times=2" in repr(connector)
