# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth and dropout of nn.EarlyCompressor: only in training, and of the right things."""

import pytest
import torch
from timm.models.vision_transformer import Block

import uhd_ops
from uhd_ops.nn import EarlyCompressor
from uhd_ops.nn.attention import drop_path, gathered_window_attention
from uhd_ops.nn.block_spec import MlpSpec
from uhd_ops.nn.mlp_forms import FORMS, WindowMlp

DIM, HEADS = 16, 2
GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS, WINDOWS = 40, 13
EPS = torch.finfo(torch.float64).eps


def compressor(form="dense", **options):
    block = Block(DIM, HEADS, qkv_bias=True, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return EarlyCompressor.from_block(block.train(), form=form)


def tokens():
    return torch.randn(TOKENS, DIM, dtype=torch.float64)


def per_window(views):
    """One value per view, repeated for its merged tokens."""
    counts = torch.tensor([-(-h // 2) * -(-w // 2) for h, w in GRIDS])
    return views.repeat_interleave(counts)


def test_without_probabilities_training_is_evaluation():
    module, x = compressor(init_values=0.3), tokens()
    assert module.training
    assert torch.equal(module(x, GRIDS), module.eval()(x, GRIDS))


@pytest.mark.parametrize(
    "options", [{"drop_path": 0.5}, {"proj_drop": 0.5}, {"attn_drop": 0.5}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_acts_in_training_only(form, options):
    module, x = compressor(form, **options), tokens()
    first = module(x, GRIDS)
    assert not torch.equal(first, module(x, GRIDS))
    first.sum().backward()
    module.eval()
    assert torch.equal(module(x, GRIDS), module(x, GRIDS))


@torch.no_grad()
def test_drop_path_takes_whole_views():
    # Without attention the result is mean(X) plus the branch, or the mean alone.
    x = tokens()
    module = compressor(drop_path=0.5)
    module.attention = "none"
    mean = uhd_ops.window_mean(x, GRIDS)
    branch = module.eval()(x, GRIDS) - mean
    module.train()
    seen = set()
    for _ in range(40):
        factor = ((module(x, GRIDS) - mean) * branch).sum(1) / branch.square().sum(1)
        kept = torch.tensor([factor[0], factor[6], factor[12]])
        assert ((factor - per_window(kept.round())).abs() < 100 * DIM * EPS).all()
        seen.add(tuple(kept.round().tolist()))
    assert seen == {(a, b, c) for a in (0.0, 2.0) for b in (0.0, 2.0) for c in (0.0, 2.0)}


def test_drop_path_of_a_batch():
    branch = torch.ones(200, 3, 4)
    dropped = drop_path(branch, 0.25)
    kept = dropped[:, :1, :1]
    assert torch.equal(dropped, kept.expand_as(branch))
    assert set(kept.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(drop_path(branch, 1.0), torch.zeros_like(branch))
    assert drop_path(branch, 0.0) is branch


@pytest.mark.parametrize("batched", [False, True])
def test_attention_path_without_dropout_is_the_operator(batched):
    shape = (2, 15, HEADS, 8) if batched else (TOKENS, HEADS, 8)
    grids = (3, 5) if batched else GRIDS
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    expected = uhd_ops.window_attention(q, k, v, grids)
    actual = gathered_window_attention(q, k, v, grids, 2)
    # Scores of 8 products in the exponent, and sums of 4 terms.
    assert (actual - expected).abs().max() <= 2 * (8 * 8**0.5 + 4) * EPS * v.abs().max()


def test_attention_dropout_keeps_the_mean():
    q, k, v = (torch.randn(6, 1, 4, dtype=torch.float64) for _ in range(3))
    expected = uhd_ops.window_attention(q, k, v, (2, 3))
    repeat = 4000
    many = [x.expand(repeat, *x.shape) for x in (q, k, v)]
    out = gathered_window_attention(*many, (2, 3), 2, dropout=0.3)
    # Six standard errors of the mean of so many draws.
    bound = 6 * out.std(0) / repeat**0.5
    assert ((out.mean(0) - expected).abs() <= bound).all()
    assert (out.std(0) > 0).any()


def mlp(hidden, form, bias=True, dim=DIM, **options):
    host = MlpSpec(
        torch.nn.Linear(dim, hidden, bias),
        torch.nn.Linear(hidden, dim, bias),
        options.pop("activation", "gelu"),
        norm=torch.nn.LayerNorm(dim),
        **options,
    )
    return WindowMlp(host, dim, 2, form).double()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_mlp_path_without_dropout_is_the_operator(form, bias, batched):
    x = torch.randn(2, 15, DIM, dtype=torch.float64) if batched else tokens()
    grids = (3, 5) if batched else GRIDS
    hidden = 24
    module = mlp(hidden, form, bias)
    expected = module(x, grids, residual=False)
    actual = module._call_layers(x, grids)
    assert module.reads_layers()
    assert actual.shape == expected.shape
    # Sums of 4 * DIM and of 4 * hidden terms, each as large as sqrt(DIM) times a standard normal.
    bound = (4 * DIM + 4 * hidden) * DIM**0.5 * EPS * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


def test_hidden_dropout_drops_hidden_channels():
    # fc2 sums what is kept: with one hidden channel, an output is 0 or twice the value.
    module = mlp(1, "dense", False, dim=4, activation="relu", hidden_dropout=0.5)
    x = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        sign = module.norm(x.flatten()).sign()
        module.fc1.weight.copy_(module.fc1.weight.abs() * sign * (torch.arange(4) == 0)[:, None])
        module.fc2.weight.abs_()
    x = x.expand(64, 4, 4)
    some = module(x, (2, 2), residual=False)
    whole = module.eval()(x, (2, 2), residual=False)
    assert set((some / whole).round().flatten().tolist()) == {0.0, 2.0}
