# SPDX-License-Identifier: Apache-2.0
"""What is special to timm's Gemma 4: padded batches, its poolers, and clamps."""

import copy
import pickle

import pytest
import torch
from families.case import assert_close
from families.gemma4 import CASES, make, make_classifier, make_encoder
from padded_batches import images_of, padded

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.nn.modules import Limits

ROUNDINGS = CASES["Gemma4VitEncoder"].roundings
# Whatever its dtype, the soft pooler computes in float32: it rounds the tokens and a ninth, and
# the products and sums of nine.
POOLER_ROUNDINGS = 20 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
DIVISIBLE = ((6, 6), (12, 6), (6, 18), (6, 6), (5, 11))  # sides by 3, when they are merged


def pool(encoder, tokens, grid):
    """The soft pooler: means over cells of 3 x 3 tokens, times the root of the width."""
    height, width = grid
    cells = tokens.unflatten(1, (height // 3, 3, width // 3, 3)).mean((2, 4)).flatten(1, 2)
    cells = cells * tokens.shape[-1] ** 0.5
    return cells if encoder.std_bias is None else (cells - encoder.std_bias) * encoder.std_scale


@torch.no_grad()
def test_ways_to_give_a_batch():
    model = insert_early_compressor(make_encoder().double(), 1)
    batch = padded(images_of())
    expected = model(batch)
    assert torch.equal(model(**{"x": batch["patches"], **_coordinates(batch)}), expected)
    marked = batch["patch_coord"].masked_fill(~batch["patch_valid"][..., None], -1)
    assert torch.equal(model(batch["patches"], marked), expected)
    x = images_of([(4, 7)])[0]
    coordinates = padded([x], length=28)["patch_coord"]
    assert_close(model(x, coordinates), model(x), ROUNDINGS)
    with pytest.raises(ValueError, match=r"come with patch_coord, got shape \(7, 51, 48\)"):
        model(batch["patches"])


def _coordinates(batch):
    return {key: batch[key] for key in ("patch_coord", "patch_valid")}


@torch.no_grad()
def test_classifier_pools_what_is_valid():
    model = insert_early_compressor(make_classifier().double(), 1)
    images = images_of()
    logits = model(padded(images))
    for index, x in enumerate(images):
        mean = model.encoder.forward_features(x).mean(1)
        assert_close(logits[index : index + 1], model.head(model.norm(mean)), ROUNDINGS)
        assert_close(logits[index : index + 1], model(x), ROUNDINGS)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@torch.no_grad()
def test_soft_pooler(standardize, wrapped):
    options = {"standardize": standardize}
    if wrapped:
        model = make_classifier(encoder_pool="soft", **options).double()
    else:
        model = make(global_pool="soft", **options).double()
    encoder = getattr(model, "encoder", model)
    if standardize:
        encoder.std_bias.normal_()
        encoder.std_scale.normal_()
    insert_early_compressor(model, 1)
    run = model.forward_features if wrapped else model
    images = images_of(DIVISIBLE)
    together = run(padded(images))
    for index, x in enumerate(images):
        grid = [-(-side // 8) for side in x.shape[2:]]
        batch = padded([x], length=x.shape[2] * x.shape[3] // 16)
        expected = pool(encoder, encoder.forward_features(batch), grid)
        assert_close(run(batch), expected, POOLER_ROUNDINGS)
        assert_close(together[index : index + 1, : expected.shape[1]], expected, POOLER_ROUNDINGS)
        if (x.shape[2], x.shape[3]) != (20, 44):  # timm wants images of whole cells
            assert_close(run(x), expected, POOLER_ROUNDINGS)
    if wrapped:
        assert model(images[0]).shape == (1, 5)


@torch.no_grad()
def test_soft_pooler_refuses_other_grids():
    model = insert_early_compressor(make(global_pool="soft"), 1)
    good, bad = images_of([(6, 6), (6, 9)], dtype=torch.float32)
    assert model(good).shape == (1, 1, 32)
    message = r"divisible by 3 for the soft pooler, got 3 x 5: .* multiple of 2 \* 3 patches"
    for x in (bad, padded([good, bad])):
        with pytest.raises(ValueError, match=message):
            model(x)
    assert model.forward_features(bad).shape == (1, 15, 32)


@torch.no_grad()
def test_intermediates_of_images_have_a_mask():
    model = insert_early_compressor(make_encoder().double(), 1)
    dense = model.forward_intermediates(images_of()[0], output_dict=True)
    assert dense["merged_patch_valid"].shape == dense["image_features"].shape[:2]
    assert dense["merged_patch_valid"].all()


@torch.no_grad()
def test_pruned_in_front_of_the_compressor():
    model = insert_early_compressor(make_encoder(), 1)
    batch = padded(images_of(dtype=torch.float32))
    model.prune_intermediate_layers([0])
    pairs = zip(model.forward_features(batch), batch["patch_valid"], strict=True)
    expected = torch.stack([tokens[valid].mean(0) for tokens, valid in pairs])
    assert_close(model(batch), expected, 64)  # sums of up to 51 tokens


@torch.no_grad()
def test_compiled_classifier_takes_padded_batches():
    model = insert_early_compressor(make_classifier(), 1)
    batch = padded(images_of(dtype=torch.float32))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(batch), model(batch))


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
@torch.no_grad()
def test_clamps_can_be_switched_off(form):
    torch.manual_seed(0)
    model = make_encoder(use_clipped_linears=True).double()
    x = CASES["Gemma4VitEncoder"].images(model, 2, torch.float64)
    clamped = insert_early_compressor(copy.deepcopy(model), 1, form=form)
    model.set_clamp_enabled(False)
    free = insert_early_compressor(model, 1, form=form)
    expected, unlimited = clamped.forward_features(x), free.forward_features(x)
    assert not torch.allclose(expected, unlimited)
    clamped.set_clamp_enabled(False)
    assert torch.equal(clamped.forward_features(x), unlimited)
    clamped.set_clamp_enabled(True)
    assert torch.equal(clamped.forward_features(x), expected)
    free.set_clamp_enabled(True)
    assert torch.equal(pickle.loads(pickle.dumps(free)).forward_features(x), expected)
    limits = [module for module in clamped.modules() if isinstance(module, Limits)]
    assert len(limits) == 3
    limits[0].output_max.fill_(0.0)  # the compressor's own
    assert not torch.equal(clamped.forward_features(x), expected)
    assert torch.equal(free.forward_features(x), expected)


def test_classifier_and_encoder_share_their_feature_info():
    model = make_classifier()
    before = copy.deepcopy(model.feature_info)
    insert_early_compressor(model, 1)
    assert model.feature_info is model.encoder.feature_info
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 8, 8]
    remove_early_compressor(model)
    assert model.feature_info == before
    insert_early_compressor(model.encoder, 1)  # alone
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 8, 8]


@pytest.mark.parametrize("part", ["attn.q_proj", "mlp.down_proj", "attn", "norm3"])
def test_refused_parts(part):
    model = make_encoder()
    block = model.blocks[1]
    module = block.get_submodule(part)
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(NotImplementedError, match=rf"block\.{part} must be .*, got Other"):
        insert_early_compressor(model, 1)
    assert type(block).__name__ == "Gemma4Block"
