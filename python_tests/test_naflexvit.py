# SPDX-License-Identifier: Apache-2.0
"""Padded batches in timm's NaFlexVit: every sample comes out as if it were alone."""

import pytest
import torch
from families.case import assert_close
from families.naflexvit import CASES, make, make_with_rope
from padded_batches import GRIDS, images_of, num_merged, padded

from uhd_ops import insert_early_compressor
from uhd_ops.retrofit.padded_layout import PaddedLayout

ROUNDINGS = CASES["NaFlexVit"].roundings
ROTARY = CASES["NaFlexVit, rotary"]
MAP = {"class_token": False, "global_pool": "map", "reg_tokens": 2}
VARIANTS = {
    "token pool": (make, {}, ROUNDINGS),
    "attention pool": (make, MAP, ROUNDINGS),
    "attention pool with prefix": (make, {**MAP, "pool_include_prefix": True}, ROUNDINGS),
    "average pool": (make, {"class_token": False, "global_pool": "avg"}, ROUNDINGS),
    "average and greatest": (make, {"global_pool": "avgmax"}, ROUNDINGS),
    "mask of keys": (make, {"global_pool": "avg", "use_key_only_attn_mask": True}, ROUNDINGS),
    "sampled positions": (make, {"pos_embed_use_grid_sample": False}, ROUNDINGS),
    "factorized positions": (make, {"pos_embed": "factorized"}, ROUNDINGS),
    **{
        name: (make_with_rope, options, ROTARY.roundings)
        for name, options in ROTARY.variants.items()
    },
}


def made(name, layer=1, **options):
    """Return a float64 model with a compressor and the roundings that its results may have."""
    make_variant, variant, roundings = VARIANTS[name]
    return insert_early_compressor(make_variant(**variant).double(), layer, **options), roundings


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_every_sample_is_what_it_is_alone(name):
    model, roundings = made(name)
    images = images_of()
    batch = padded(images)
    features, logits = model.forward_features(**batch), model(batch)
    valid = features["patch_valid"]
    longest = max(num_merged(x) for x in images)
    assert features["patches"].shape[1] == model.num_prefix_tokens + longest
    for index, x in enumerate(images):
        count = num_merged(x)
        assert valid[index].tolist() == [True] * count + [False] * (longest - count)
        own = features["patches"][index : index + 1, : model.num_prefix_tokens + count]
        assert_close(own, model.forward_features(x), roundings)
        assert_close(logits[index : index + 1], model(x), roundings)


@pytest.mark.parametrize(
    "options",
    [{"layer": 0}, {"layer": 3}, {"window": 3}, {"attention": False}, {"positions": "reindex"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["average pool", "axial", "mixed"])
@torch.no_grad()
def test_options(name, options):
    model, roundings = made(name, **options)
    images = images_of()
    logits = model(padded(images))
    for index, x in enumerate(images):
        assert_close(logits[index : index + 1], model(x), roundings)


@pytest.mark.parametrize("name", ["average pool", "mixed", "dinov3"])
def test_gradients_are_the_sum_of_those_alone(name):
    model, _ = made(name)
    images = images_of()
    model(padded(images)).square().sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for x in images:
        model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        # The table of positions is interpolated in float32 whatever its dtype.
        assert_close(together[key], parameter.grad, ROTARY.roundings * len(images))


@pytest.mark.parametrize("name", ["average pool", "axial", "mixed"])
def test_gradient_checkpointing(name):
    model, _ = made(name)
    batch = padded(images_of())
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        out = model(batch)
        model(padded(images_of([(2, 2), (4, 3)])))  # must not leave its layout
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["average pool", "token pool"])
@torch.no_grad()
def test_without_padding_in_front_of_the_compressor(name):
    # 16 patches each, but 4 and 8 merged tokens: the mask begins behind the compressor.
    model, roundings = made(name)
    images = images_of([(4, 4), (16, 1)])
    batch = padded(images, length=16)
    expected = torch.cat([model(x) for x in images])
    assert_close(model(batch), expected, roundings)
    del batch["patch_valid"]
    features = model.forward_features(**batch)
    assert features["patch_valid"].sum(1).tolist() == [4, 8]
    assert_close(model.forward_head(**features), expected, roundings)
    features = model.forward_features(batch["patches"][:1], batch["patch_coord"][:1])
    assert features["patch_valid"] is None


@torch.no_grad()
def test_sample_without_patches():
    model, roundings = made("average pool")
    x = images_of([(4, 3)])
    batch = padded(x * 2)
    batch["patch_valid"][1] = False
    logits = model(batch)
    assert_close(logits[:1], model(x[0]), roundings)
    assert logits.isfinite().all()


@torch.no_grad()
def test_intermediates():
    model, roundings = made("axial")
    images = images_of()
    batch = padded(images)
    found = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
    assert torch.equal(found["patch_valid"], batch["patch_valid"])
    assert found["merged_patch_valid"].sum(1).tolist() == [num_merged(x) for x in images]
    features = model.forward_features(**batch)
    assert torch.equal(found["image_features"], features["patches"])
    assert torch.equal(found["merged_patch_valid"], features["patch_valid"])
    by_argument = model.forward_intermediates(
        batch["patches"],
        patch_coord=batch["patch_coord"],
        patch_valid=batch["patch_valid"],
        output_fmt="NLC",
        intermediates_only=True,
    )
    for index, x in enumerate(images):
        alone = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        valid = [found["patch_valid"], *[found["merged_patch_valid"]] * 3]
        for layer, y in enumerate(found["image_intermediates"]):
            assert torch.equal(y, by_argument[layer])
            assert_close(y[index][valid[layer][index]], alone[layer][0], roundings)


@torch.no_grad()
def test_pruned_in_front_of_the_compressor():
    model, _ = made("average pool")
    batch = padded(images_of())
    model.prune_intermediate_layers([0])
    features = model.forward_features(**batch)
    assert torch.equal(features["patch_valid"], batch["patch_valid"])
    assert features["patches"].shape[1] == batch["patches"].shape[1]


@pytest.mark.parametrize("name", ["average pool", "mixed"])
@torch.no_grad()
def test_compiled_model_takes_padded_batches(name):
    model, _ = made(name)
    batch = padded(images_of())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(batch), model(batch))
    x = images_of()[0]
    assert torch.equal(compiled(x), model(x))


@torch.no_grad()
def test_drop_path_drops_whole_samples():
    model = make(class_token=False, global_pool="avg", drop_path_rate=0.5)
    insert_early_compressor(model, 3).train()  # the rate of the last block is that given
    layout = PaddedLayout.of(**coordinates(), prefix=0, device="cpu")
    x = torch.randn(len(GRIDS), layout.length, 32)
    torch.manual_seed(0)
    outs = [layout.merge(x, model.blocks[3].compressor) for _ in range(60)]
    for sample in range(len(GRIDS)):
        # Either branch of a sample is there or not, for all of its tokens.
        assert len({tuple(out[sample].flatten().tolist()) for out in outs}) == 4


def coordinates():
    batch = padded(images_of())
    return {"coordinates": batch["patch_coord"], "valid": batch["patch_valid"]}


def test_packing():
    layout = PaddedLayout.of(**coordinates(), prefix=1, device="cpu")
    x = torch.randn(len(GRIDS), layout.length, 5)
    packed = layout.pack(x)
    assert torch.equal(packed, torch.cat([x[i, : h * w] for i, (h, w) in enumerate(GRIDS)]))
    assert torch.equal(layout.unpack(packed), x * layout.valid[..., None])
    assert list(layout.grids) == list(GRIDS)
    assert layout.merged(2).merged(2).length == 4
    mask = layout.key_mask(torch.float16)
    assert mask.shape == (len(GRIDS), 1, 1, 1 + layout.length)
    assert torch.equal(mask[:, 0, 0, 1:] == 0, layout.valid)
    assert (mask[..., 0] == 0).all()
    assert mask.isfinite().all()
