# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.flops`` against torch's counter on real passes, for every family of models."""

import hf_models
import pytest
import torch
import transformers
from families import all_cases
from torch.utils.flop_counter import FlopCounterMode

from uhd_ops import flops, insert_early_compressor, insert_progressive_compression
from uhd_ops.nn import ABLATION

CASES = all_cases() | hf_models.all_cases()
LAYER = 1
FORMS = ("dense", "block", "tied")
VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
# The forms take turns: every family has each of them, most in several variants.
VARIANTS = [(*pair, FORMS[index % 3]) for index, pair in enumerate(VARIANTS)]
# Plain; gated MLP and fewer heads of keys than of queries; clamps; a bias on the scores.
ABLATED = [
    ("VisionTransformer", "odd"),
    ("Eva, rotary", "Sapiens2"),
    ("Gemma4VitEncoder", "grouped queries"),
    ("VisionTransformerRelPos", "table, class token"),
]
ROTARY = ("Eva, rotary", "Gemma4VitEncoder")


def made(name, variant=None):
    model = CASES[name].make_first() if variant is None else CASES[name].make_variant(variant)
    return model.requires_grad_(False)  # torch's ModuleTracker fails on a leaf as input


def counted(forward, blocks, *inputs, **options):
    """Count a real pass: the total, and what happens inside each block, in MACs."""
    flops.register_formulas()
    per_block, handles = [], []
    with FlopCounterMode(display=False) as counter:
        for block in blocks:
            enter = block.register_forward_pre_hook(
                lambda *_: per_block.append(-counter.get_total_flops())
            )

            def leave(*_):
                per_block[-1] += counter.get_total_flops()

            handles += [enter, block.register_forward_hook(leave)]
        with torch.no_grad():
            forward(*inputs, **options)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() // 2, [count // 2 for count in per_block]


def by_block(report):
    """Totals of the blocks, each with the compressor behind it."""
    totals = []
    for row in report.layers:
        if "compressor" in row.name:
            totals[-1] += row.total
        elif row.name not in ("patch_embed", "head"):
            totals.append(row.total)
    return totals


def check(case, model, x):
    forward = getattr(model, "forward_features", model)
    report = flops.count_forward(forward, x)
    total, per_block = counted(forward, model.get_submodule(case.blocks), x)
    assert per_block == by_block(report)
    assert report.total == total
    return report


@pytest.mark.parametrize(("name", "variant", "form"), VARIANTS, ids=str)
def test_equals_the_flop_counter(name, variant, form):
    case, model = CASES[name], insert_early_compressor(made(name, variant), LAYER, form=form)
    report = check(case, model, case.images(model, 2))
    names = [row.name for row in report.layers]
    assert names[0] == "patch_embed"
    assert names[LAYER + 2] == "compressor"
    assert names[-1] == "head"
    tokens = [row.tokens for row in report.layers[1:-1]]
    assert tokens[0] == tokens[1] >= tokens[2] > tokens[3] == tokens[4]
    assert all(row.linear > 0 and row.attention > 0 for row in report.layers[1:-1])


@pytest.mark.parametrize("name", CASES)
def test_of_vit(name):
    """Per grid, without the head, and with or without the native kernels the same."""
    case, model = CASES[name], made(name)
    x = case.images(model, 1)
    before = check(case, model, x)
    grid = tuple(s // p for s, p in zip(x.shape[-2:], flops.patch_size(model), strict=True))
    report = flops.of_vit(model, [grid, grid])
    assert report.layers[0].tokens == 2 * grid[0] * grid[1]
    assert [2 * row.total for row in before.layers[:-1]] == [row.total for row in report.layers]
    with_it = flops.of_vit(insert_early_compressor(model, LAYER), [grid])
    assert with_it["compressor"].total > 0
    assert 2 * with_it.layers[1].total == report.layers[1].total
    assert 2 * with_it.layers[-1].total < report.layers[-1].total


@pytest.mark.parametrize("ablation", ABLATION)
@pytest.mark.parametrize(("name", "variant"), ABLATED, ids=str)
def test_every_variant_of_the_ablation(name, variant, ablation):
    case, options, model = CASES[name], ABLATION[ablation], made(name, variant)
    if name == "VisionTransformerRelPos" and "cross" in ablation:
        with pytest.raises(NotImplementedError, match=r"needs attention .* without a bias table"):
            insert_early_compressor(model, LAYER, **options)
    elif name in ROTARY and ablation == "cross-attention, mean query":
        insert_early_compressor(model, LAYER, **options)
        with pytest.raises(NotImplementedError, match="has no rotary position for its query"):
            check(case, model, case.images(model, 2))
    else:
        check(case, insert_early_compressor(model, LAYER, **options), case.images(model, 2))


@pytest.mark.parametrize(("name", "variant"), ABLATED, ids=str)
def test_progressive_compression(name, variant):
    case, model = CASES[name], made(name, variant)
    report = check(case, insert_progressive_compression(model, (0, 2)), case.images(model, 2))
    tokens = [row.tokens for row in report.layers if row.name.startswith("compressors.")]
    assert len(tokens) == 2
    assert tokens[0] > 3 * tokens[1]


@pytest.mark.parametrize("compressed", [False, True])
def test_padded_batch_of_transformers(compressed):
    """Siglip2 takes patches with a mask and the shapes of the images."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
    config = transformers.Siglip2VisionConfig(**size, intermediate_size=48, num_patches=16)
    model = transformers.Siglip2VisionModel(config).eval().requires_grad_(False)
    if compressed:
        insert_early_compressor(model, LAYER)
    shapes = torch.tensor([(3, 5), (4, 2)])
    mask = (torch.arange(16) < shapes.prod(1)[:, None]).int()
    inputs = torch.randn(2, 16, 3 * 8 * 8), mask, shapes
    assert flops.count_forward(model, *inputs).total == counted(model, (), *inputs)[0]
    with pytest.raises(NotImplementedError, match=r"^vit must take images and nothing else, but"):
        flops.of_vit(model, [(3, 5)])


@pytest.mark.parametrize("name", hf_models.CASES)
def test_grids_that_a_model_was_not_made_for(name):
    case = hf_models.CASES[name]
    model = insert_early_compressor(case.make(), LAYER).requires_grad_(False)
    x = hf_models.random_images(12, 20, 1, torch.float32)
    report = flops.count_forward(model, x, **case.options_for(x))
    assert flops.of_vit(model, [(3, 5)]).total == report.total - report["head"].total
    total, _ = counted(model, (), x, **case.options_for(x))
    assert report.total == total
