# SPDX-License-Identifier: Apache-2.0
"""What holds for every module that merges tokens: compressor, connector, pooling, resampler."""

import copy
import functools
import pickle

import pytest
import torch
from battery import TWELVE
from battery.marks import native_only
from families.case import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from uhd_ops import PackedGrids
from uhd_ops.nn import (
    EarlyCompressor,
    PixelUnshuffleConnector,
    QueryResampler,
    WindowTokenCompressor,
)

DIM, OUT = 16, 24
GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS = 40
early = functools.partial(EarlyCompressor, DIM, 2, qk_norm=True, layer_scale=0.5)
crossed = functools.partial(EarlyCompressor, DIM, 2, layer_scale=0.5)
connector = functools.partial(PixelUnshuffleConnector, DIM, OUT)
pooling = functools.partial(WindowTokenCompressor, DIM)
resampler = functools.partial(QueryResampler, DIM, OUT, num_queries=5, num_heads=2)
MODULES = {
    **{f"early, {form}": functools.partial(early, form=form) for form in ("dense", "block")},
    "early, tied, dropped": functools.partial(early, form="tied", drop_path=1.0),
    "early, 3 x 3": functools.partial(early, window=3),
    "early, MLP only": functools.partial(EarlyCompressor, DIM, 2, attention=False),
    "early, top left": functools.partial(crossed, attention="cross_top_left", form="tied"),
    "early, mean": functools.partial(crossed, attention="cross_mean", form="tied"),
    "connector": connector,
    "connector, twice": functools.partial(connector, merger_times=2),
    "pooling": pooling,
    "pooling, 3 x 3": functools.partial(pooling, window=3),
    "pooling, mean": functools.partial(pooling, pool="mean"),
    "pooling, unshuffle": functools.partial(pooling, pool="unshuffle"),
    "resampler": resampler,
}
NAMES = pytest.mark.parametrize("name", MODULES)
# A dozen sums of at most 4 * 4 * DIM products, in a forward and a backward pass.
ROUNDINGS = 12 * 16 * DIM * 64


def made(name, dtype=torch.float64):
    module = MODULES[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def tokens(*shape):
    return torch.randn(*(shape or (TOKENS,)), DIM, dtype=torch.float64, requires_grad=True)


@NAMES
def test_batched_equals_packed(name):
    module, x = made(name), tokens(3, 15)
    packed = module(x.flatten(0, 1), [(3, 5)] * 3)
    batched = module(x, (3, 5))
    assert batched.shape[0] == 3
    wanted, actual = packed.view(batched.shape), batched
    assert_close(actual, wanted, ROUNDINGS)
    weight = torch.randn_like(wanted)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (actual, wanted)]
    assert_close(*grads, ROUNDINGS)


@NAMES
def test_every_parameter_and_every_token_gets_a_gradient(name):
    module, x = made(name), tokens()
    module(x, GRIDS).square().sum().backward()
    assert x.grad.abs().sum(1).all()
    for key, parameter in module.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, key


@NAMES
@torch.no_grad()
def test_copies(name):
    module, x = made(name), tokens()
    loaded = MODULES[name]().double().eval()
    loaded.load_state_dict(module.state_dict())
    expected = module(x, GRIDS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x, GRIDS), expected)
    meta = MODULES[name](device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} <= {("meta", torch.bfloat16)}
    assert meta.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("training", [False, True])
@NAMES
def test_no_views(name, training):
    module = made(name).train(training)
    out = module(tokens(0), [])
    assert out.shape[0] == 0
    assert out.shape[1:] == module(tokens(6), [(2, 3)]).shape[1:]


@native_only("the definitions read grids as data, which is not meant to be compiled")
@pytest.mark.parametrize(
    "name", ["early, tied, dropped", "early, top left", "early, mean", "connector", "pooling"]
)
def test_three_graphs_serve_all_grids(name):
    torch._dynamo.reset()
    module = made(name).train("dropped" in name)  # with a rate of 1 there is nothing to draw
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for pairs in TWELVE:
        grids = PackedGrids(pairs)
        x = tokens(grids.num_tokens)
        wanted, out = module(x, grids), compiled(x, grids)
        assert_close(out, wanted, ROUNDINGS)
        weight = torch.randn_like(out)
        grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, wanted)]
        assert_close(*grads, ROUNDINGS)
    assert backend.frame_count <= 3
    torch._dynamo.reset()


FEW = {
    "early": early,
    "MLP only": MODULES["early, MLP only"],
    "connector": connector,
    "pooling": pooling,
    "resampler": resampler,
}
BAD_CALLS = [
    (torch.zeros(15, DIM - 1), [(3, 5)], ValueError, r"x must have C = 16 .* got shape \(15, 15\)"),
    (torch.zeros(14, DIM), [(3, 5)], ValueError, r"x must be \(N, C\) with N = 15 tokens"),
    (torch.zeros(2, 15, DIM), [(3, 5)] * 2, ValueError, r"x of shape \(2, 15, 16\) is batched"),
    (torch.zeros(15, DIM).int(), [(3, 5)], TypeError, "x must be float32"),
    (None, [(3, 5)], TypeError, "x must be a torch.Tensor, got NoneType"),
    ([[1.0]], [(1, 1)], TypeError, "x must be a torch.Tensor, got list"),
    (torch.zeros(15, DIM), None, TypeError, "grids must be a PackedGrids"),
    (torch.zeros(15, DIM), "4x6", TypeError, "grids must be a PackedGrids"),
]


@pytest.mark.parametrize(("x", "grids", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_bad_calls(make, x, grids, error, message):
    with pytest.raises(error, match=message):
        make()(x, grids)


def test_the_resampler_refuses_empty_views():
    with pytest.raises(ValueError, match="grids must not hold an empty view"):
        resampler()(torch.zeros(15, DIM), [(3, 5), (0, 2)])


BAD_OPTIONS = {
    EarlyCompressor: [
        ({"form": "sparse"}, ValueError, 'form must be "dense", "block" or "tied", got \'sparse\''),
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"window": True}, TypeError, "window must be an int, got bool"),
        ({"attention": 1}, TypeError, "attention must be a bool or a str, got int"),
        ({"num_heads": 5}, ValueError, "num_heads must divide dim = 16, got 5"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"hidden_dim": 1.5}, TypeError, "hidden_dim must be an int, got float"),
        ({"drop_path": 1.5}, ValueError, "drop_path must be between 0 and 1, got 1.5"),
        ({"bias": None}, TypeError, "bias must be a bool, got NoneType"),
        ({"qk_norm": 1}, TypeError, "qk_norm must be a bool, got int"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"layer_scale": "0.1"}, TypeError, "layer_scale must be a number, got str"),
        ({"activation": "mish"}, ValueError, "activation must be one of .*, got 'mish'"),
    ],
    PixelUnshuffleConnector: [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"out_dim": 2.0}, TypeError, "out_dim must be an int, got float"),
        ({"merger_times": 0}, ValueError, "merger_times must be at least 1, got 0"),
        ({"merger_times": True}, TypeError, "merger_times must be an int, got bool"),
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"activation": "mish"}, ValueError, "activation must be one of .*, got 'mish'"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ],
    WindowTokenCompressor: [
        (
            {"pool": "max"},
            ValueError,
            'pool must be "adaptive", "mean" or "unshuffle", got \'max\'',
        ),
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"window": 2.0}, TypeError, "window must be an int, got float"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim must be at least 1, got 0"),
        ({"dim": True}, TypeError, "dim must be an int, got bool"),
    ],
    QueryResampler: [
        ({"out_dim": 30}, ValueError, "out_dim must be a multiple of 4 and of num_heads = 1"),
        ({"num_heads": 5}, ValueError, "out_dim must be a multiple of 4 and of num_heads = 5"),
        ({"num_queries": 0}, ValueError, "num_queries must be at least 1, got 0"),
        ({"dim": 1.5}, TypeError, "dim must be an int, got float"),
        ({"eps": -1}, ValueError, "eps must not be negative, got -1"),
    ],
}
GOOD_OPTIONS = {
    EarlyCompressor: {"dim": DIM, "num_heads": 2},
    WindowTokenCompressor: {"dim": DIM},
}


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [(cls, *row) for cls, rows in BAD_OPTIONS.items() for row in rows],
)
def test_bad_options(cls, options, error, message):
    good = GOOD_OPTIONS.get(cls, {"dim": DIM, "out_dim": OUT})
    with pytest.raises(error, match=message):
        cls(**{**good, **options})
