# SPDX-License-Identifier: Apache-2.0
"""nn.SliceEncoder on every family: each view becomes what the model makes of it alone."""

import copy

import hf_models
import pytest
import torch
from families import all_cases
from families.case import randomise
from timm.models.vision_transformer import VisionTransformer
from tiny_minicpm import images, tiny_tower
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from views_alone import (
    GRIDS,
    alone,
    assert_close,
    assert_packed_equals_alone,
    exact,
    random_views,
)

from uhd_ops import (
    PackedGrids,
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
)
from uhd_ops.nn import EarlyCompressor, SliceEncoder
from uhd_ops.nn.positions import Rotary, merge_table
from uhd_ops.retrofit.adapter import CoarsePart
from uhd_ops.retrofit.registry import packed_of

# timm's resizing of relative positions gives torch tensors and indices in forms that it warns of;
# so do its RMSNorms under autocast.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]
# What the encoder promises, relative to the largest value of a view.
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


def make_siglip2(**options):
    size = {name: hf_models.SIZE[name] for name in hf_models.SIZE if name != "image_size"}
    config = Siglip2VisionConfig(**size, intermediate_size=48, num_patches=25, **options)
    return randomise(Siglip2VisionModel(config))


TIMM = all_cases()
HF = {
    **{f"transformers: {name}": case.make for name, case in hf_models.CASES.items()},
    **{f"transformers: {name} backbone": c.make for name, c in hf_models.BACKBONES.items()},
    "transformers: SigLIP 2": make_siglip2,
}
FIRST = {name: (c.make, next(iter(c.variants.values()))) for name, c in TIMM.items()}
FIRST |= {name: (make, {}) for name, make in HF.items()}
VARIANTS = {f"{n}, {v}": (c.make, o) for n, c in TIMM.items() for v, o in c.variants.items()}
VARIANTS |= {name: (make, {}) for name, make in HF.items()}


def make(name):
    maker, options = (VARIANTS | FIRST)[name]
    return maker(**options)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_view_alone(name):
    model = exact(make(name))
    views = random_views(model)
    result = SliceEncoder(model)(views)
    assert result.grids == PackedGrids(GRIDS)
    assert_packed_equals_alone(model, result, views, BOUND[torch.float64])


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_view_alone_with_a_compressor(name):
    model = insert_early_compressor(exact(make(name)), 1)
    views = random_views(model)
    result = SliceEncoder(model)(views)
    assert result.grids == PackedGrids(GRIDS).merged(2)
    assert_packed_equals_alone(model, result, views, BOUND[torch.float64])


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_float32(name):
    model = insert_early_compressor(make(name), 2, positions="reindex")
    views = random_views(model, dtype=torch.float32)
    assert_packed_equals_alone(model, SliceEncoder(model)(views), views, BOUND[torch.float32])


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_progressive_compression(name):
    model = insert_progressive_compression(exact(make(name)), (0, 2))
    views = random_views(model)
    result = SliceEncoder(model)(views)
    assert result.grids == PackedGrids(GRIDS).merged(4)
    assert_packed_equals_alone(model, result, views, BOUND[torch.float64])


def native_view(model):
    """A view of the size that the model was made for."""
    vit, packed = packed_of(model)
    rows, cols = packed.patch_size(vit)
    grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None) or (7, 7)
    return torch.rand(3, grid[0] * rows, grid[1] * cols, dtype=torch.float64)


def gradients(model, output):
    """Gradient of every parameter by name, None where there is none, of a random projection."""
    model.zero_grad()
    weight = torch.randn(
        output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1)
    )
    (output * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FIRST)
def test_gradients_with_and_without_checkpointing(name):
    model = insert_early_compressor(exact(make(name)), 1)
    encoder, view = SliceEncoder(model), native_view(model)
    views = [random_views(model, [(2, 3)])[0], view]  # the other one must not leak into it

    def second():
        result = encoder(views)
        return torch.cat([result.prefix[1], result.per_view()[1]])

    expected = gradients(model, alone(model, view, copied=False))
    packed = gradients(model, second()[-len(alone(model, view)) :])
    vit, _ = packed_of(model)
    if hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing(True)
    else:  # in transformers in training only; none of these has dropout
        vit.activation_checkpointing_enable()
        vit.get_submodule(vit.blocks_name).train()
    again = gradients(model, second()[-len(alone(model, view)) :])
    for parameter, grad in expected.items():
        assert (grad is None) == (packed[parameter] is None), parameter
        if grad is not None and grad.numel():  # no registers have no numbers
            scale = max(1.0, grad.abs().max())
            assert (packed[parameter] - grad).abs().max() <= 1e-10 * scale, parameter
            assert torch.equal(again[parameter], packed[parameter]), parameter


class Twice(torch.nn.Module):
    """A compressor that merges the tokens of a view, and merges them again."""

    def __init__(self, compressor, positions, frequencies):
        super().__init__()
        self.inner, self.window = compressor, compressor.window**2
        self.positions, self.frequencies = positions, frequencies

    def forward(self, x, grids, positions=None):
        merged, (grid,) = self.inner(x, grids, positions), PackedGrids.of(grids)
        if positions is not None:
            tables = (table.transpose(-3, -2) for table in positions)  # (..., H, N, D)
            tables = merge_table(*tables, grid, 2, self.positions, self.frequencies)
            positions = Rotary(*(table.transpose(-3, -2) for table in tables))
        fewer = tuple(-(-side // 2) for side in grid)
        return self.inner(merged, fewer if x.dim() == 3 else [fewer], positions)


def merged_twice(model):
    """A copy of a model whose compressor merges twice."""
    model = copy.deepcopy(model)
    vit, packed = packed_of(model)
    own = packed(vit, PackedGrids([]))
    block = own.blocks[1]
    twice = Twice(block.compressor, own.merged_positions, own.frequencies())
    # A block gives positions to EarlyCompressor alone.
    twice.__class__ = type("TwiceEarly", (Twice, EarlyCompressor), {})
    block.compressor = twice
    for part in model.modules():
        if isinstance(part, CoarsePart):
            part.window = 4
    return model


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_ratios(name):
    model = insert_early_compressor(exact(make(name)), 1)
    views = random_views(model)
    result = SliceEncoder(model)(views, ratios=[1, 4, 4, 1])
    merged, kept = PackedGrids(GRIDS).merged(2), GRIDS
    assert list(result.grids) == [kept[0], merged[1], merged[2], kept[3]]
    plain = remove_early_compressor(copy.deepcopy(model))
    for view, tokens, prefix, source in zip(
        views, result.per_view(), result.prefix, (plain, model, model, plain), strict=True
    ):
        expected = alone(source, view)
        actual = torch.cat([prefix, tokens])
        assert_close(actual[len(actual) - len(expected) :], expected, BOUND[torch.float64])
    again = SliceEncoder(model)(views, ratios=[16, 4, 16, 1])
    assert list(again.grids) == [(2, 2), merged[1], (1, 3), kept[3]]
    twice = merged_twice(model)
    for index in (0, 2):
        expected = alone(twice, views[index])
        actual = torch.cat([again.prefix[index], again.per_view()[index]])
        assert_close(actual[len(actual) - len(expected) :], expected, BOUND[torch.float64])
    assert_close(again.per_view()[1], result.per_view()[1], BOUND[torch.float64])
    assert_close(again.per_view()[3], result.per_view()[3], BOUND[torch.float64])


@pytest.mark.parametrize("name", FIRST)
def test_no_views_give_every_parameter_its_zero_gradient(name):
    model = insert_early_compressor(make(name), 1)
    encoder = SliceEncoder(model)
    encoder([torch.rand_like(v) for v in random_views(model, dtype=torch.float32)]).tokens.sum()
    used = gradients(model, encoder(random_views(model, dtype=torch.float32)).tokens)
    result = encoder([], views_per_image=[0, 0])
    assert result.views_per_image == (0, 0)
    assert len(result.tokens) == len(result.prefix) == len(result.grids) == 0
    none = gradients(model, result.tokens)
    assert {n for n, g in none.items() if g is not None} == {
        n for n, g in used.items() if g is not None
    }
    assert not any(grad.any() for grad in none.values() if grad is not None)


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_autocast(name):
    model = insert_early_compressor(make(name), 1)
    views = random_views(model, dtype=torch.float32)
    exactly = SliceEncoder(model)(views).tokens
    with torch.autocast("cpu", torch.bfloat16):
        tokens = SliceEncoder(model)(views).tokens.float()
    # The mean over the tokens of what a dozen roundings to 8 bits do, and their squares add up.
    error = (tokens - exactly).square().mean().sqrt() / exactly.square().mean().sqrt()
    assert error <= 12 * torch.finfo(torch.bfloat16).eps


def test_training_draws_positions_for_each_view():
    model = make("Eva, rotary, Sapiens2").train()
    (view,) = random_views(model, [(4, 5)], torch.float32)
    first, second = SliceEncoder(model)([view, view]).per_view()
    assert not torch.allclose(first, second)
    first, second = SliceEncoder(model.eval())([view, view]).per_view()
    assert_close(first, second, BOUND[torch.float32])


def siglip_like(tower):
    """Timm's SigLIP with the weights of a tower of MiniCPM-V 4.6, its compressor included."""
    config = tower.config
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        class_token=False,
        global_pool="",
        act_layer="gelu_tanh",
        num_classes=0,
    )
    vit = insert_early_compressor(vit.double().eval(), config.insert_layer_id)
    state = tower.state_dict()
    own = {
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "norm.weight": state["post_layernorm.weight"],
        "norm.bias": state["post_layernorm.bias"],
    }
    for index in range(config.num_hidden_layers):
        here, there = f"blocks.{index}", f"encoder.layers.{index}"
        for part in ("weight", "bias"):
            qkv = [state[f"{there}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            own[f"{here}.attn.qkv.{part}"] = torch.cat(qkv)
            own[f"{here}.attn.proj.{part}"] = state[f"{there}.self_attn.out_proj.{part}"]
            for layer in ("fc1", "fc2"):
                own[f"{here}.mlp.{layer}.{part}"] = state[f"{there}.mlp.{layer}.{part}"]
            for norm in (1, 2):
                own[f"{here}.norm{norm}.{part}"] = state[f"{there}.layer_norm{norm}.{part}"]
    merger, compressor = "vit_merger", f"blocks.{config.insert_layer_id}.compressor"
    names = {"norm": "pre_norm", "fc1": "linear_1", "fc2": "linear_2"}
    for part in ("weight", "bias"):
        qkv = [state[f"{merger}.self_attn.{x}_proj.{part}"] for x in "qkv"]
        own[f"{compressor}.attn.qkv.{part}"] = torch.cat(qkv)
        own[f"{compressor}.attn.proj.{part}"] = state[f"{merger}.self_attn.out_proj.{part}"]
        own[f"{compressor}.attn.norm.{part}"] = state[f"{merger}.layer_norm1.{part}"]
        for ours, theirs in names.items():
            own[f"{compressor}.mlp.{ours}.{part}"] = state[f"{merger}.{theirs}.{part}"]
    vit.load_state_dict(own)
    return vit


@torch.no_grad()
def test_nearest_positions_are_those_of_the_tower_of_minicpm():
    tower = tiny_tower()
    grids = [(8, 12), (4, 4), (8, 12), (4, 8)]
    pixels, sizes = images(grids)
    expected = tower(pixels, sizes).last_hidden_state[0]
    side = tower.config.patch_size
    patches = pixels[0].unflatten(-1, (-1, side)).permute(2, 0, 1, 3)
    vit = siglip_like(tower)
    result = SliceEncoder(vit, positions="nearest")(patches, grids)
    assert_close(result.tokens, expected, BOUND[torch.float64])
    resampled = SliceEncoder(vit)(patches, grids)
    assert (resampled.tokens - expected).abs().max() > 0.01 * expected.abs().max()
