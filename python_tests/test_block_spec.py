# SPDX-License-Identifier: Apache-2.0
"""A block that was read runs as the block itself, with its parameters as they are at that time."""

import functools

import pytest
import torch
from families.case import assert_close
from families.timm_blocks import CASES as OTHERS
from families.vision_transformer import CASES as PLAIN
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import nn
from torch.nn import functional

from uhd_ops import PackedGrids
from uhd_ops.nn import EarlyCompressor
from uhd_ops.nn.attention import ViewScope
from uhd_ops.nn.block_spec import read_block

CASES = PLAIN | OTHERS
VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
# Equal neighbours, equal ones apart, an empty one, one token.
GRIDS = PackedGrids([(3, 4), (3, 4), (2, 5), (0, 3), (1, 1), (2, 5)])
PREFIX = 2
ROUNDINGS = 12 * 512  # a dozen products of at most 4 * 4 * 32 terms in a row


def block_of(name, variant, **options):
    case = CASES[name]
    return case.make(**case.variants[variant] | options).double().blocks[1]


def packed_tokens(dim, dtype=torch.float64):
    return torch.randn(GRIDS.num_tokens + PREFIX * len(GRIDS), dim, dtype=dtype)


def each_alone(block, x):
    """The block on every view, one after the other."""
    views = x.split([PREFIX + h * w for h, w in GRIDS])
    return torch.cat([block(view[None])[0] for view in views])


def run(block, x):
    return read_block(block).run(x, ViewScope(GRIDS, PREFIX))


def assert_close_gradients(block, x, actual, expected):
    """Some are zero but for rounding, so the bound is relative to the largest of all."""
    names, inputs = zip(*[("x", x), *block.named_parameters()], strict=True)
    found, wanted = (
        torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)
        for output in (actual, expected)
    )
    largest = max(gradient.abs().max() for gradient in wanted if gradient is not None)
    for name, own, theirs in zip(names, found, wanted, strict=True):
        assert (own is None) == (theirs is None), name
        if own is not None:
            # timm takes the exponential of the lambdas in float32, whatever the type of the model.
            dtype = torch.float32 if "lambda" in name else torch.float64
            assert (own - theirs).abs().max() <= ROUNDINGS * torch.finfo(dtype).eps * largest, name


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_views_of_a_packed_sequence(name, variant):
    block = block_of(name, variant)
    x = packed_tokens(32).requires_grad_()
    actual, expected = run(block, x), each_alone(block, x)
    assert_close(actual, expected, ROUNDINGS)
    assert_close_gradients(block, x, actual, expected)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
@torch.no_grad()
def test_parameters_are_those_of_the_moment(name, variant):
    block, other = block_of(name, variant), block_of(name, variant)
    spec, x = read_block(block), packed_tokens(32)
    for assign in (False, True):  # into the parameters, and in their place
        other.load_state_dict({k: torch.randn_like(v) for k, v in other.state_dict().items()})
        block.load_state_dict(other.state_dict(), assign=assign)
        expected = each_alone(other, x)
        assert_close(spec.run(x, ViewScope(GRIDS, PREFIX)), expected, ROUNDINGS)


class Adapted(nn.Module):
    """A linear layer with a second one of low rank beside it, as adapters are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def with_every_linear(block, change):
    """Replace all linear layers of a block."""
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, change(child))
    return block


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_adapters_take_effect(name, variant):
    block = with_every_linear(block_of(name, variant), lambda layer: Adapted(layer).double())
    x = packed_tokens(32).requires_grad_()
    actual, expected = run(block, x), each_alone(block, x)
    assert_close(actual, expected, ROUNDINGS)
    assert_close_gradients(block, x, actual, expected)
    with pytest.raises(NotImplementedError, match=r"block\..* must be Linear, got Adapted"):
        EarlyCompressor.from_block(block)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
@torch.no_grad()
def test_hooks_of_linear_layers_run(name, variant):
    block, x = block_of(name, variant), packed_tokens(32)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: out + args[0].sum(-1, True))
    # The bias of an output that two branches share is told apart by what zeros become.
    assert_close(run(block, x), each_alone(block, x), ROUNDINGS)


class Linear(nn.Module):
    """A layer of another library that keeps its weight in eight bits."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.scale = layer.bias, layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), False)

    def forward(self, x):
        return functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("name", ["VisionTransformer", "DiffParallelScalingBlock"])
@torch.no_grad()
def test_quantised_layers(name):
    block, x = block_of(name, "odd"), packed_tokens(32)
    plain = run(block, x)
    with_every_linear(block, Linear)
    assert_close(run(block, x), each_alone(block, x), ROUNDINGS)
    assert not torch.equal(run(block, x), plain)
    with pytest.raises(
        NotImplementedError, match=r"must be torch\.nn\..*Linear, got test_block_spec"
    ):
        EarlyCompressor.from_block(block)


DROPS = {
    "attention weights": {"attn_drop_rate": 0.5},
    "outputs and hidden channels": {"proj_drop_rate": 0.5},
    "views": {"drop_path_rate": 0.9},
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CASES
        if name not in ("ViTamin", "VisionTransformerDistilled", "VisionTransformer, any size")
    ],
)
@torch.no_grad()
def test_dropout_acts_in_training_only(name, drop):
    variant = next(iter(CASES[name].variants))
    block, x = block_of(name, variant, **drop), packed_tokens(32)
    assert torch.equal(run(block, x), run(block, x))
    block.train()
    assert not torch.equal(run(block, x), run(block, x))


@pytest.mark.parametrize("block_fn", [ParallelScalingBlock, DiffParallelScalingBlock])
@torch.no_grad()
def test_parallel_branches_of_a_view_are_dropped_together(block_fn):
    block = block_fn(32, 2, drop_path=0.5).double()
    grids = PackedGrids([(2, 3)] * 64)
    x = torch.randn(grids.num_tokens, 32, dtype=torch.float64)
    added = (read_block(block.train()).run(x, ViewScope(grids)) - x).unflatten(0, (64, 6))
    block.eval()
    whole = 2 * (block(x.unflatten(0, (64, 6))) - x.unflatten(0, (64, 6)))
    dropped = (added == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    assert_close(added[~dropped], whole[~dropped], ROUNDINGS)


def test_packed_gates_stay_apart():
    block = CASES["VisionTransformer"].make(mlp_layer=SwiGLUPacked).blocks[0]
    (mlp,) = read_block(block).mlps
    gate, up = block.mlp.fc1.weight.chunk(2)
    assert torch.equal(mlp.gate.weight, gate)
    assert torch.equal(mlp.fc1.weight, up)
    mlp.fc1.weight.sum().backward()
    assert torch.equal(block.mlp.fc1.weight.grad, torch.cat([0 * gate, torch.ones_like(up)]))


@pytest.mark.parametrize("query", ["cross_top_left", "cross_mean"])
@torch.no_grad()
def test_bias_of_the_scores_of_each_view(query):
    """Views that share an entry are computed together; a function makes it of the queries."""
    block = block_of("VisionTransformer", "odd")
    spec, x = read_block(block), packed_tokens(32)
    lengths = [PREFIX + h * w for h, w in GRIDS]
    tables = {n: torch.randn(2, n, n, dtype=torch.float64) for n in set(lengths)}
    bias = [tables[n] for n in lengths]
    if query == "cross_mean":
        makers = {n: functools.partial(torch.add, table) for n, table in tables.items()}
        bias = [lambda q, n=n: (q @ q.transpose(-1, -2)).mul(makers[n](0)) for n in lengths]
    actual = spec.run(x, ViewScope(GRIDS, PREFIX, bias))
    expected = []
    for view, n in zip(x.split(lengths), lengths, strict=True):
        (part,) = spec.attentions
        qkv = part.projections[0](part.norm(view)).unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)
        q, k, v = qkv
        add = tables[n] if query == "cross_top_left" else (q @ q.transpose(-1, -2)) * tables[n]
        out = ((q @ k.transpose(-1, -2)) / 4 + add).softmax(-1) @ v
        y = view + part.proj(out.transpose(0, 1).flatten(1))
        expected.append(y + spec.mlps[0].run(y, ViewScope(GRIDS)))
    assert_close(actual, torch.cat(expected), ROUNDINGS)
