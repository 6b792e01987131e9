# SPDX-License-Identifier: Apache-2.0
"""accelerate() leaves the numbers of MiniCPM-V 4.6 and 4.7 as they are, and accepts odd grids."""

import copy

import pytest
import torch
from tiny_minicpm import (
    DIM,
    EVEN,
    ODD,
    ROUNDINGS,
    TOWERS,
    assert_close,
    connector_by_hand,
    images,
    prompt,
    tiny_model,
    tiny_tower,
    tower_by_hand,
)
from transformers import AttentionInterface

from uhd_ops.integrations.transformers import accelerate

VERSIONS = pytest.mark.parametrize("version", TOWERS)
MODES = pytest.mark.parametrize("mode", ["16x", "4x"])


def last_of(tower, pixels, sizes, **options):
    return tower(pixels, target_sizes=sizes, **options).last_hidden_state


@VERSIONS
@pytest.mark.parametrize("use_vit_merger", [True, False])
@pytest.mark.parametrize("grids", [EVEN, [(8, 8)]], ids=["mixed", "one view"])
def test_same_numbers(version, use_vit_merger, grids):
    tower = tiny_tower(version)
    ours = accelerate(copy.deepcopy(tower))
    pixels, sizes = images(grids)
    options = {"use_vit_merger": use_vit_merger}
    expected = last_of(tower, pixels, sizes, **options)
    assert_close(last_of(ours, pixels, sizes, **options), expected)
    pixels, tower, ours = pixels.float(), tower.float(), ours.float()
    difference = last_of(ours, pixels, sizes, **options) - last_of(tower, pixels, sizes, **options)
    assert difference.abs().max() <= 1e-5  # after a LayerNorm: relative to a deviation of one


@VERSIONS
@MODES
@pytest.mark.parametrize("merger_times", [1, 2])
@pytest.mark.parametrize("what", ["image", "video"])
def test_features(version, mode, merger_times, what):
    grids = [(8, 16), (16, 8), (8, 16), (8, 8)]  # the original wants multiples of 8 in two stages
    model = tiny_model(version, merger_times=merger_times)
    pixels, sizes = images(grids)
    ours = accelerate(copy.deepcopy(model))
    expected, actual = (
        getattr(m, f"get_{what}_features")(pixels, sizes, downsample_mode=mode).pooler_output
        for m in (model, ours)
    )
    for view, wanted in zip(actual, expected, strict=True):
        assert_close(view, wanted)


@VERSIONS
@MODES
@pytest.mark.parametrize("merger_times", [1, 2])
@pytest.mark.parametrize("grids", [ODD, EVEN + ODD], ids=["odd", "even and odd"])
def test_odd_grids(version, mode, merger_times, grids):
    model = accelerate(tiny_model(version, merger_times=merger_times))
    pixels, sizes = images(grids)
    result = model.get_image_features(pixels, sizes, downsample_mode=mode)
    views = tower_by_hand(model.model.vision_tower, pixels, grids, mode == "16x")
    assert_close(result.last_hidden_state[0], torch.cat([tokens for tokens, _ in views]))
    for actual, (tokens, grid) in zip(result.pooler_output, views, strict=True):
        assert_close(actual, connector_by_hand(model.model.merger, tokens, *grid))
    side = 2 ** (merger_times + (mode == "16x"))
    counts = [-(-height // side) * -(-width // side) for height, width in grids]
    assert [len(view) for view in result.pooler_output] == counts
    assert torch.equal(sizes, torch.tensor(grids))


@VERSIONS
def test_the_original_refuses_odd_grids(version):
    with pytest.raises(ValueError, match="divisible by window kernel size"):
        tiny_tower(version)(*images([(7, 9)])[:1], target_sizes=torch.tensor([[7, 9]]))


@VERSIONS
@pytest.mark.parametrize("config_mode", ["16x", "4x"])
def test_logits_and_generation(version, config_mode):
    model = tiny_model(version, downsample_mode=config_mode)
    pixels, sizes = images(EVEN)
    side = 4 if config_mode == "16x" else 2
    counts = [height * width // side**2 for height, width in EVEN]
    inputs = {**prompt(model, counts), "pixel_values": pixels, "target_sizes": sizes}
    if version == "4.6":
        del inputs["mm_token_type_ids"]
    ours = accelerate(copy.deepcopy(model))
    assert_close(ours(**inputs).logits, model(**inputs).logits)
    texts = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, ours)]
    assert torch.equal(*texts)


@VERSIONS
@MODES
def test_odd_grids_in_the_language_model(version, mode):
    model = accelerate(tiny_model(version))
    pixels, sizes = images(ODD)
    views = model.get_image_features(pixels, sizes, downsample_mode=mode).pooler_output
    inputs = {**prompt(model, [len(view) for view in views]), "target_sizes": sizes}
    options = {"downsample_mode": mode}
    if version == "4.6":
        del inputs["mm_token_type_ids"]
    logits = model(pixel_values=pixels, **inputs, **options).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = embeds.masked_scatter((inputs["input_ids"] == 1)[..., None], torch.cat(views))
    positions = None
    if version == "4.7":  # images of merged tokens, whose sides are no longer rounded
        side = 4 if mode == "16x" else 2
        merged = -(-sizes // side) * side
        inputs["target_sizes"] = merged
        positions, _ = type(model.model).body_class.get_rope_index(model.model, **inputs, **options)
    expected = model(inputs_embeds=embeds, position_ids=positions).logits
    assert_close(logits, expected)
    inputs["target_sizes"] = sizes
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 2] = 10  # one placeholder less
    with pytest.raises(ValueError, match="features and tokens do not match"):
        model(pixel_values=pixels, **inputs, **options)


@VERSIONS
def test_gradients(version):
    tower = tiny_tower(version)
    ours = accelerate(copy.deepcopy(tower))
    pixels, sizes = images(EVEN)
    for model in (tower, ours):
        out = last_of(model.train(), pixels, sizes)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for (name, expected), actual in zip(tower.named_parameters(), ours.parameters(), strict=True):
        largest = max(p.grad.abs().max() for p in tower.parameters())
        difference = (actual.grad - expected.grad).abs().max()
        # The backward pass is as long again, and adds up the rows of all tokens.
        bound = 2 * ROUNDINGS * out.numel() // DIM * torch.finfo(torch.float64).eps * largest
        assert difference <= bound, name


@pytest.mark.parametrize("part", ["tower", "merger"])
def test_bfloat16_is_no_worse_than_the_original(part):
    original = tiny_tower(hidden_size=128, intermediate_size=512).bfloat16()
    exact, ours = copy.deepcopy(original).double(), accelerate(copy.deepcopy(original))
    pixels, sizes = images([(16, 12), (8, 8), (16, 12)], torch.bfloat16)
    if part == "tower":
        run = lambda model: last_of(model, pixels.to(model.dtype), sizes)  # noqa: E731
    else:
        x = torch.randn(1, int(sizes.prod(1).sum()), 128, dtype=torch.bfloat16)
        run = lambda model: model.vit_merger(x.to(model.dtype), sizes)  # noqa: E731
    expected = run(exact)
    errors = [(run(model).double() - expected).norm() for model in (ours, original)]
    # Both round as often. The squared norms are sums over windows, of which each has rounding
    # errors of its own, so they differ by chance by about the root of their number.
    assert errors[0] <= errors[1] * (1 + expected.shape[1] ** -0.5)


def test_autocast():
    tower = tiny_tower(dtype=torch.float32)
    ours = accelerate(copy.deepcopy(tower))
    pixels, sizes = images(EVEN, torch.float32)
    exact = last_of(copy.deepcopy(tower).double(), pixels.double(), sizes)
    with torch.autocast("cpu", torch.bfloat16):
        actual, original = (last_of(model, pixels, sizes) for model in (ours, tower))
    assert actual.dtype == original.dtype
    # Two independent sets of rounding errors of the same size: their norms differ by less than 2.
    assert (actual - exact).norm() <= 2 * (original - exact).norm()


def test_several_sequences_of_the_same_grids():
    tower = tiny_tower()
    pixels, sizes = images(EVEN)
    pixels = torch.cat([pixels, pixels.flip(-1)])
    expected = last_of(tower, pixels, sizes, use_vit_merger=False)
    accelerate(tower)
    assert_close(last_of(tower, pixels, sizes, use_vit_merger=False), expected)
    with pytest.raises(ValueError, match=r"hidden_states must be \(1, N, C\).* got shape \(2, 240"):
        tower(pixels, target_sizes=sizes)


def test_attention_without_grids():
    tower = tiny_tower()
    pixels, sizes = images(EVEN)
    x = tower.embeddings(pixels, target_sizes=sizes)
    starts = torch.tensor([0, 96, 112, 208, 240])
    module = tower.encoder.layers[0].self_attn
    expected, _ = module(x, starts, None)
    actual, weights = accelerate(tower).encoder.layers[0].self_attn(x, starts, None)
    assert_close(actual, expected)
    assert weights is None


def test_flash_attention_stays(monkeypatch):
    seen = []

    def flash(module, query, key, value, **options):
        seen.append((options["cu_seq_lens_q"].tolist(), options["max_length_q"]))
        return query.transpose(1, 2), None

    tower = accelerate(tiny_tower())
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_of_a_test", flash)
    tower.config._attn_implementation_internal = "flash_of_a_test"
    pixels, sizes = images([(7, 9), (2, 2)])
    tower(pixels, target_sizes=sizes)
    assert seen == [([0, 63, 67], 63)] * 2 + [([0, 20, 21], 20)]


def test_attention_dropout():
    tower = tiny_tower(attention_dropout=0.5)
    ours = accelerate(copy.deepcopy(tower))
    pixels, sizes = images(EVEN)
    assert_close(last_of(ours, pixels, sizes), last_of(tower, pixels, sizes))
    outs = []
    for model in (tower.train(), ours.train(), ours):
        torch.manual_seed(0)
        outs.append(last_of(model, pixels, sizes, use_vit_merger=False))
    assert torch.equal(outs[0], outs[1])  # layers: the original's own calls
    assert torch.equal(outs[1], outs[2])
    # Inside the windows the draws are others; dropping every weight leaves out_proj's bias.
    module = ours.vit_merger.self_attn
    module.attention_dropout = 1.0
    out, _ = module(torch.randn(1, 16, DIM, dtype=torch.float64), grids=[(4, 4)], window=2)
    assert torch.equal(out, module.out_proj.bias.expand(1, 16, DIM))
