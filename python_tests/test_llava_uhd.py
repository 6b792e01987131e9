# SPDX-License-Identifier: Apache-2.0
"""Towers of LLaVA-UHD v3 by their released names, against their arithmetic written by hand."""

import math

import pytest
import torch
from families.case import assert_close
from hf_packed import ROUNDINGS, Float64Throughout
from torch.nn import functional

from uhd_ops.integrations.transformers import moonvit_from_llava_uhd

CHANNELS, HEADS, HIDDEN, LAYERS, PATCH, TABLE = 16, 2, 24, 4, 4, (5, 5)
GRIDS = [(4, 8), (8, 8), (12, 4)]


def linear(inputs, outputs):
    return {
        "weight": torch.randn(outputs, inputs, dtype=torch.float64) / math.sqrt(inputs),
        "bias": torch.randn(outputs, dtype=torch.float64),
    }


def released(merges=(1, 2), hidden=CHANNELS, prefix=""):
    """Random weights by the names of a released tower; without ``hidden``, merges are means."""
    norm = {"weight": CHANNELS, "bias": CHANNELS}
    parts = {
        "patch_embed.proj": {
            "weight": torch.randn(CHANNELS, 3, PATCH, PATCH, dtype=torch.float64) / 7,
            "bias": torch.randn(CHANNELS, dtype=torch.float64),
        },
        "patch_embed.pos_emb": {"weight": torch.randn(*TABLE, CHANNELS, dtype=torch.float64)},
        "encoder.final_layernorm": norm,
    }
    for index in range(LAYERS):
        block = f"encoder.blocks.{index}"
        parts |= {f"{block}.norm0": norm, f"{block}.norm1": norm}
        parts |= {f"{block}.wqkv": linear(CHANNELS, 3 * CHANNELS)}
        parts |= {f"{block}.wo": linear(CHANNELS, CHANNELS)}
        parts |= {f"{block}.mlp.fc0": linear(CHANNELS, HIDDEN)}
        parts |= {f"{block}.mlp.fc1": linear(HIDDEN, CHANNELS)}
        if index in merges:
            unused = {"weight": torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)}
            parts |= {f"{block}.merger.zero_init_fc": unused}
        if index in merges and hidden:
            parts |= {f"{block}.merger.attn_layer.0": linear(2 * CHANNELS, hidden)}
            parts |= {f"{block}.merger.attn_layer.2": linear(hidden, CHANNELS)}
    return {
        f"{prefix}{part}.{kind}": torch.randn(value, dtype=torch.float64)
        if isinstance(value, int)
        else value
        for part, tensors in parts.items()
        for kind, value in tensors.items()
    }


def by_hand(weights, images, merges):
    """Tokens of images, each ``(h * w, 3, p, p)`` with its grid, as the released tower has them."""

    def apply(name, x):
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return functional.layer_norm(
            x, (CHANNELS,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    results = []
    for patches, (height, width) in images:
        kernel = weights["patch_embed.proj.weight"].flatten(1)
        x = patches.flatten(1) @ kernel.T + weights["patch_embed.proj.bias"]
        table = weights["patch_embed.pos_emb.weight"].permute(2, 0, 1)[None]
        table = functional.interpolate(table, (height, width), mode="bicubic")[0]
        x = x + table.flatten(1).T
        for index in range(LAYERS):
            block = f"encoder.blocks.{index}"
            qkv = apply(f"{block}.wqkv", norm(f"{block}.norm0", x))
            q, k, v = qkv.unflatten(1, (3, HEADS, -1)).unbind(1)
            turns = turns_of(height, width, q.shape[-1])
            q, k = (turned(part, turns) for part in (q, k))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + apply(f"{block}.wo", y)
            hidden = apply(f"{block}.mlp.fc0", norm(f"{block}.norm1", x))
            x = x + apply(f"{block}.mlp.fc1", functional.gelu(hidden, approximate="tanh"))
            if index in merges:
                x = merged(x.view(height, width, -1), f"{block}.merger.attn_layer", weights, apply)
                height, width = height // 2, width // 2
        results.append(norm("encoder.final_layernorm", x))
    return torch.cat(results)


def turns_of(height, width, dim):
    """A complex number for each token and pair of neighbouring channels: column, row, column."""
    frequencies = 1 / 10000.0 ** (torch.arange(0, dim, 4, dtype=torch.float32) / dim)
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([cols, rows], -1).flatten(0, 1).double()
    angles = (frequencies.double()[:, None] * places[:, None]).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def turned(x, turns):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def merged(x, name, weights, apply):
    """Pool 2 x 2 windows of ``(h, w, C)``; the mean where there are no weights."""
    rows = []
    for top in range(0, x.shape[0], 2):
        for left in range(0, x.shape[1], 2):
            tokens = x[top : top + 2, left : left + 2].flatten(0, 1)
            share = torch.full_like(tokens, 0.25)
            if f"{name}.0.weight" in weights:
                both = torch.cat([tokens, tokens.mean(0).expand_as(tokens)], 1)
                share = apply(f"{name}.2", functional.gelu(apply(f"{name}.0", both))).softmax(0)
            rows.append((share * tokens).sum(0))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize(
    ("merges", "hidden"),
    [((1, 2), CHANNELS), ((0,), 4 * CHANNELS), ((2,), CHANNELS // 2), ((0, 3), None), ((), None)],
)
def test_towers(merges, hidden):
    weights = released(merges, hidden)
    model = moonvit_from_llava_uhd(weights, num_heads=HEADS)
    images = [
        (torch.randn(height * width, 3, PATCH, PATCH, dtype=torch.float64), (height, width))
        for height, width in GRIDS
    ]
    pixels = torch.cat([patches for patches, _ in images])
    with Float64Throughout():
        output = model(pixels, torch.tensor([(1, *grid) for grid in GRIDS]))
    assert_close(output.last_hidden_state, by_hand(weights, images, merges), ROUNDINGS)
    assert torch.equal(output.pooler_output[:, 0], output.last_hidden_state)
    assert getattr(getattr(model, "compression", None), "layers", ()) == merges


@torch.no_grad()
def test_a_tower_inside_a_model_and_its_dtype():
    weights = {"model.embed_tokens.weight": torch.randn(5, 3)}
    weights |= released(prefix="model.vision_tower.vision_tower.")
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    model = moonvit_from_llava_uhd(weights, num_heads=HEADS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    name = "layers.1.compressor.fc1.weight"
    old = "model.vision_tower.vision_tower.encoder.blocks.1.merger.attn_layer.0.weight"
    assert torch.equal(model.state_dict()[name], weights[old])
    weights[old].zero_()
    assert model.state_dict()[name].any()


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda weights: list(weights), TypeError, "state_dict must be a mapping, got list"),
        (without("patch_embed"), ValueError, r"must hold one tower, .*, got 0"),
        (
            lambda weights: weights | released(prefix="other."),
            ValueError,
            r"must hold one tower, .*, got 2",
        ),
        (
            lambda weights: weights | {"encoder.blocks.0.gate.weight": torch.ones(1)},
            ValueError,
            r"names of a released MoonViT, got 'encoder\.blocks\.0\.gate\.weight'",
        ),
        (
            without("blocks.2.merger.attn_layer"),
            ValueError,
            r"layers\.2\.compressor\.fc1\.bias must have shape \(16,\), got None",
        ),
        (
            lambda weights: weights | {"patch_embed.pos_emb.weight": torch.ones(3, 5, CHANNELS)},
            ValueError,
            "a square table of positions, got 3 x 5",
        ),
        (without("norm1.bias"), ValueError, r"4 of its tensors, .* layers\.0\.norm2\.bias must"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        moonvit_from_llava_uhd(change(released()), num_heads=HEADS)


@pytest.mark.parametrize("num_heads", [0, 3, 8])
def test_heads_must_divide_the_channels(num_heads):
    with pytest.raises(ValueError, match=r"num_heads must"):
        moonvit_from_llava_uhd(released(), num_heads=num_heads)
