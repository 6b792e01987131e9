# SPDX-License-Identifier: Apache-2.0
"""Hosts with 2-D rotary embeddings: the operators inside MoonViT and Qwen2.5-VL of transformers.

Every host runs as a whole on random weights. Hooks keep what each attention layer got and what it
passed to its output projection; the operators get the same queries, keys and values, rotated by the
host's own function, and must return the same.
"""

import contextlib
from typing import NamedTuple

import pytest
import torch
from specs import SPECS, Call
from transformers.models.kimi_k25 import modeling_kimi_k25 as kimi
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

import uhd_ops
from uhd_ops import PackedGrids

HEADS = 2


class Attention(NamedTuple):
    """What one attention layer got, and what it handed to its output projection."""

    module: torch.nn.Module
    hidden: torch.Tensor  # (N, C)
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin, (N, D)
    lengths: list[int]  # tokens of each segment
    mixed: torch.Tensor  # (N, C)


def randomised(model):
    """Random parameters of unit variance behind every matrix; constant ones would hide errors."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    model.config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    return model.double().eval()


@contextlib.contextmanager
def recorded(model):
    """Yield a list that receives an Attention of every layer that runs."""
    calls, records, hooks = [], [], []
    for module in model.modules():
        if type(module).__name__.endswith("VisionAttention"):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: calls.append((module, args[0], kwargs)),
                    with_kwargs=True,
                )
            )
            hooks.append(
                module.proj.register_forward_pre_hook(
                    lambda proj, args: records.append(_attention(*calls[-1], args[0]))
                )
            )
    yield records
    for hook in hooks:
        hook.remove()


def _attention(module, hidden, kwargs, mixed):
    lengths = kwargs["cu_seqlens"].diff().tolist()
    return Attention(module, hidden, kwargs["position_embeddings"], lengths, mixed)


def projected(attention, host):
    """Return q, k and v ``(N, H, D)``, the first two rotated by the host's own function."""
    module, x = attention.module, attention.hidden
    if host is qwen:
        q, k, v = module.qkv(x).unflatten(1, (3, HEADS, -1)).unbind(1)
    else:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        q, k, v = (proj(x).unflatten(1, (HEADS, -1)) for proj in projections)
    return *host.apply_rotary_pos_emb_vision(q, k, *attention.rotary), v


def moved(x, grids, **orders):
    """Reorder tokens of any shape ``(N, ...)``."""
    return uhd_ops.reorder_tokens(x.flatten(1), grids, **orders).view_as(x)


def assert_like(name, qkv, grids, actual, wanted, dtype=torch.float64, **options):
    """Both are results of attention: each may be off by the SPEC's tolerance for ``dtype``."""
    spec, call = SPECS[name], Call((*qkv, list(grids)), options)
    wanted = wanted.view_as(actual)
    error = (actual - wanted).abs()
    assert bool((error <= 2 * spec.tolerance(call, dtype, wanted)).all()), error.max()


# ---- MoonViT: raster order, images of any size and clips


@pytest.fixture(scope="module")
def moonvit():
    config = kimi.Kimi_K25VisionConfig(
        hidden_size=HEADS * 72,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=64,
        pos_emb_height=8,
        pos_emb_width=8,
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    return randomised(kimi.Kimi_K25VisionModel(config))


def run_moonvit(model, grid_thw):
    patches = sum(t * h * w for t, h, w in grid_thw)
    pixels = torch.randn(patches, 3, 14, 14, dtype=torch.float64)
    with torch.no_grad(), recorded(model) as records:
        output = model(pixels, grid_thw=torch.tensor(grid_thw))
    assert len(records) == 2
    return records, output


IMAGES, CLIPS = [(1, 6, 8), (1, 2, 10)], [(3, 4, 4), (3, 2, 6)]
INPUTS = pytest.mark.parametrize("grid_thw", [IMAGES, CLIPS], ids=["images", "clips"])


@torch.no_grad()
@INPUTS
def test_moonvit_attention_is_view_attention(moonvit, grid_thw):
    segments = [(t * h, w) for t, h, w in grid_thw]  # a clip is one segment
    records, _ = run_moonvit(moonvit, grid_thw)
    for attention in records:
        assert attention.lengths == PackedGrids(segments).cu_seqlens().diff().tolist()
        qkv = projected(attention, kimi)
        out = uhd_ops.view_attention(*qkv, segments)
        assert_like("view_attention", qkv, segments, out, attention.mixed)


@torch.no_grad()
@INPUTS
def test_windows_in_moonvit(moonvit, grid_thw):
    # What the host itself computes when told that every 2 x 2 window is a segment.
    grids = PackedGrids([(h, w) for t, h, w in grid_thw for _ in range(t)])  # frames are views
    attention = run_moonvit(moonvit, grid_thw)[0][0]
    hidden, *rotary = (
        moved(x, grids, order="block") for x in (attention.hidden, *attention.rotary)
    )
    windows = torch.arange(0, grids.num_tokens + 1, 4, dtype=torch.int32)
    with recorded(moonvit) as records:
        attention.module(hidden, cu_seqlens=windows, position_embeddings=tuple(rotary))
    wanted = moved(records[0].mixed, grids, order_in="block")

    qkv = projected(attention, kimi)
    out = uhd_ops.window_attention(*qkv, grids)
    # The host rotates in float32, which may round products of another order differently.
    assert_like("window_attention", qkv, grids, out, wanted, torch.float32, window=2)


@torch.no_grad()
def test_moonvit_merger_is_pixel_unshuffle(moonvit):
    _, output = run_moonvit(moonvit, IMAGES)
    merged = uhd_ops.pixel_unshuffle(output.last_hidden_state, [(h, w) for _, h, w in IMAGES])
    assert torch.equal(merged, output.pooler_output.flatten(1))


@torch.no_grad()
def test_coordinates_are_those_of_the_host():
    grids = PackedGrids([(6, 8), (3, 5)])
    wanted = kimi.get_vision_position_ids(torch.tensor([(1, 6, 8), (1, 3, 5)]), 1)
    assert torch.equal(grids.coordinates(), wanted.float())


@torch.no_grad()
def test_rules_for_merged_coordinates(moonvit):
    # Rotated attention sees differences of coordinates only: centres are numbers that count double.
    grids = PackedGrids([(6, 8)])
    merged = grids.merged(2)
    centers = uhd_ops.window_mean(grids.coordinates(), grids)
    anew = merged.coordinates()
    q, k, v = torch.randn(3, merged.num_tokens, HEADS, 72)

    def attend(coordinates):
        cos, sin = moonvit.rotary_emb(q, coordinates)
        return uhd_ops.view_attention(
            *kimi.apply_rotary_pos_emb_vision(q, k, cos, sin), v, merged
        ).double()

    # An angle of at most 8 radians is off by half an epsilon of itself, times 72 products.
    roundings = SPECS["view_attention"].roundings(Call((q, k, v, list(merged)))) + 72 * 8
    allowed = 2 * roundings * torch.finfo(torch.float32).eps * v.abs().max()
    assert (attend(centers) - attend(2 * anew)).abs().max() <= allowed
    assert (attend(centers) - attend(anew)).abs().max() > 100 * allowed


# ---- Qwen2.5-VL: 2 x 2-block-major tokens, 8 x 8 windows with ragged borders

QWEN_GRIDS = [(12, 20), (8, 10), (2, 6), (16, 16), (4, 26)]
LAYERS_ORDER = (8, 2)


class QwenRun(NamedTuple):
    model: torch.nn.Module
    grids: PackedGrids
    grid_thw: torch.Tensor
    records: list[Attention]
    output: object


@pytest.fixture(scope="module")
def qwen_run():
    config = qwen.Qwen2_5_VLVisionConfig(
        hidden_size=HEADS * 80,
        num_heads=HEADS,
        depth=3,
        intermediate_size=64,
        out_hidden_size=48,
        fullatt_block_indexes=[1],
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model = randomised(qwen.Qwen2_5_VisionTransformerPretrainedModel(config))
    grids = PackedGrids(QWEN_GRIDS)
    grid_thw = torch.tensor([(1, *grid) for grid in grids])
    pixels = torch.randn(grids.num_tokens, 3 * 2 * 14 * 14, dtype=torch.float64)
    with torch.no_grad(), recorded(model) as records:
        output = model(pixels, grid_thw=grid_thw)
    return QwenRun(model, grids, grid_thw, records, output)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("order_in", [LAYERS_ORDER, "window", "block", "raster", (4,)], ids=str)
def test_qwen_windows_are_window_attention(qwen_run, layer, order_in):
    grids, attention = qwen_run.grids, qwen_run.records[layer]
    sides = [(min(8, h - r), min(8, w - c)) for h, w in grids for r, c in corners(h, w)]
    assert attention.lengths == [h * w for h, w in sides]  # ragged ones among them
    assert len(set(sides)) > 4
    qkv = projected(attention, qwen)
    named = (8,) if order_in == "window" else order_in
    there = [moved(x, grids, order=named, order_in=LAYERS_ORDER) for x in qkv]
    out = uhd_ops.window_attention(*there, grids, 8, order_in=order_in, order=LAYERS_ORDER)
    assert_like("window_attention", qkv, grids, out, attention.mixed, window=8)


def corners(height, width):
    return [(r, c) for r in range(0, height, 8) for c in range(0, width, 8)]


@torch.no_grad()
def test_qwen_full_attention_is_view_attention(qwen_run):
    grids, attention = qwen_run.grids, qwen_run.records[1]
    assert attention.lengths == grids.cu_seqlens().diff().tolist()
    qkv = projected(attention, qwen)
    out = uhd_ops.view_attention(*qkv, grids)  # in any order inside a view
    assert_like("view_attention", qkv, grids, out, attention.mixed)


@torch.no_grad()
def test_qwen_rotates_by_our_coordinates(qwen_run):
    grids = qwen_run.grids
    coordinates = uhd_ops.reorder_tokens(grids.coordinates(), grids, LAYERS_ORDER)
    ours = qwen_run.model.rotary_pos_emb(coordinates, coordinates)
    for mine, host in zip(ours, qwen_run.records[0].rotary, strict=True):
        assert torch.equal(mine, host)


@torch.no_grad()
def test_qwen_merger_is_pixel_unshuffle(qwen_run):
    x = qwen_run.output.last_hidden_state  # in the order of the layers
    window_index, _ = qwen.get_vision_window_index(qwen_run.grid_thw, 2, 112, 14)
    wanted = x.view(len(window_index), -1)[window_index.argsort()]
    merged = uhd_ops.pixel_unshuffle(x, qwen_run.grids, order_in=LAYERS_ORDER)
    assert torch.equal(merged, wanted)
