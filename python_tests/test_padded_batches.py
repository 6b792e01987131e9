# SPDX-License-Identifier: Apache-2.0
"""Padded batches in NaFlexVit and Gemma 4: every sample comes out as if it were alone."""

import pytest
import torch
from families import gemma4, naflexvit
from families.case import assert_close, run_features
from families.naflexvit import make, make_with_rope
from padded_batches import GRIDS, images_of, num_merged, padded

from uhd_ops import insert_early_compressor
from uhd_ops.retrofit.padded_layout import PaddedLayout

ROUNDINGS = naflexvit.CASES["NaFlexVit"].roundings
ROTARY = naflexvit.CASES["NaFlexVit, rotary"]
OF_GEMMA = gemma4.CASES["Gemma4VitEncoder"]
AVERAGE = {"class_token": False, "global_pool": "avg"}
MAP = {"class_token": False, "global_pool": "map", "reg_tokens": 2}
VARIANTS = {
    "token pool": (make, {}, ROUNDINGS),
    "attention pool": (make, MAP, ROUNDINGS),
    "attention pool with prefix": (make, {**MAP, "pool_include_prefix": True}, ROUNDINGS),
    "average pool": (make, AVERAGE, ROUNDINGS),
    "average and greatest": (make, {"global_pool": "avgmax"}, ROUNDINGS),
    "mask of keys": (make, {"global_pool": "avg", "use_key_only_attn_mask": True}, ROUNDINGS),
    "sampled positions": (make, {"pos_embed_use_grid_sample": False}, ROUNDINGS),
    "factorized positions": (make, {"pos_embed": "factorized"}, ROUNDINGS),
    **{name: (make_with_rope, kind, ROTARY.roundings) for name, kind in ROTARY.variants.items()},
    "Gemma 4": (OF_GEMMA.make, {}, OF_GEMMA.roundings),
    "Gemma 4, clamps": (OF_GEMMA.make, {"use_clipped_linears": True}, OF_GEMMA.roundings),
    "Gemma 4, grouped queries": (OF_GEMMA.make, {"num_kv_heads": 1}, OF_GEMMA.roundings),
}


def made(name, layer=1, dtype=torch.float64, **options):
    """Return a model with a compressor and the roundings that its results may have."""
    make_variant, variant, roundings = VARIANTS[name]
    model = make_variant(**variant).to(dtype)
    return insert_early_compressor(model, layer, **options), roundings


def features_of(model, batch):
    """Tokens ``(B, P + L, C)`` and the number P of tokens in front of the patches."""
    if type(model).__name__.endswith("NaFlexVit"):
        return model.forward_features(**batch)["patches"], model.num_prefix_tokens
    return model.forward_features(batch), 0


def check_each_alone(model, roundings):
    images = images_of()
    batch = padded(images)
    (features, prefix), pooled = features_of(model, batch), model(batch)
    assert features.shape[1] == prefix + max(num_merged(x, window=window_of(model)) for x in images)
    for index, x in enumerate(images):
        own = features[index : index + 1, : prefix + num_merged(x, window=window_of(model))]
        assert_close(own, run_features(model, x), roundings)
        assert_close(pooled[index : index + 1], model(x), roundings)


def window_of(model):
    return model.compression.window


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_every_sample_is_what_it_is_alone(name):
    check_each_alone(*made(name))


@pytest.mark.parametrize(
    "options",
    [{"layer": 0}, {"layer": 3}, {"window": 3}, {"attention": False}, {"positions": "reindex"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["average pool", "axial", "mixed", "Gemma 4"])
@torch.no_grad()
def test_options(name, options):
    check_each_alone(*made(name, **options))


@pytest.mark.parametrize("name", ["average pool", "mixed", "dinov3", "Gemma 4"])
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


@pytest.mark.parametrize("name", ["average pool", "axial", "mixed", "Gemma 4"])
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


@pytest.mark.parametrize("name", ["axial", "Gemma 4"])
@torch.no_grad()
def test_intermediates(name):
    model, roundings = made(name)
    images = images_of()
    batch = padded(images)
    found = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
    assert torch.equal(found["patch_valid"], batch["patch_valid"])
    assert found["merged_patch_valid"].sum(1).tolist() == [num_merged(x) for x in images]
    assert torch.equal(found["image_features"], features_of(model, batch)[0])
    valid = [found["patch_valid"], *[found["merged_patch_valid"]] * 3]
    for index, x in enumerate(images):
        alone = model.forward_intermediates(x, intermediates_only=True)
        for layer, y in enumerate(found["image_intermediates"]):
            own = alone[layer].flatten(2).transpose(1, 2)[0]
            assert_close(y[index][valid[layer][index]], own, roundings)
    with pytest.raises(ValueError, match='output_fmt must be "NLC" for a padded batch'):
        model.forward_intermediates(batch)


@torch.no_grad()
def test_intermediates_of_naflexvit_by_argument():
    model, _ = made("axial")
    batch = padded(images_of())
    options = {"output_fmt": "NLC", "output_dict": True}
    found = model.forward_intermediates(batch, **options)
    valid = model.forward_features(**batch)["patch_valid"]
    assert torch.equal(found["merged_patch_valid"], valid)
    for index, x in enumerate(images_of()):
        count = num_merged(x)
        assert valid[index].tolist() == [True] * count + [False] * (len(valid[index]) - count)
    by_argument = model.forward_intermediates(batch.pop("patches"), **batch, **options)
    for y, wanted in zip(
        by_argument["image_intermediates"], found["image_intermediates"], strict=True
    ):
        assert torch.equal(y, wanted)


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
def test_pruned_in_front_of_the_compressor():
    model, _ = made("average pool")
    batch = padded(images_of())
    model.prune_intermediate_layers([0])
    features = model.forward_features(**batch)
    assert torch.equal(features["patch_valid"], batch["patch_valid"])
    assert features["patches"].shape[1] == batch["patches"].shape[1]


@pytest.mark.parametrize("name", ["average pool", "mixed", "Gemma 4"])
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


# ---- what NaFlexVit refuses: batches without whole grids, masks, parts -------------------------


def swap(batch):
    batch["patch_coord"][0, [1, 2]] = batch["patch_coord"][0, [2, 1]]


def punch(batch):
    batch["patch_valid"][3, 4] = False


def cut(batch):
    batch["patch_valid"][3, 9] = False


def shift(batch):
    batch["patch_coord"] += 1


def float_coordinates(batch):
    batch["patch_coord"] = batch["patch_coord"].double()


def shorten(batch):
    batch["patch_valid"] = batch["patch_valid"][:, 1:]


def flatten(batch):
    batch["patch_coord"] = batch["patch_coord"].flatten(1)


def mask(batch):
    batch["attn_mask"] = torch.zeros(len(GRIDS), 1, 1, batch["patches"].shape[1])


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"one whole grid for each sample.*sample 0, with .* \(6, 6\), do not", swap),
        (ValueError, r"those of sample 3, with coordinates up to \(4, 1\)", punch),
        (ValueError, r"those of sample 3, with coordinates up to \(4, 1\)", cut),
        (ValueError, r"those of sample 0, with coordinates up to \(7, 7\)", shift),
        (TypeError, "patch_coord must hold integers, got torch.float64", float_coordinates),
        (ValueError, r"patch_valid must have shape \(7, 51\).*, got \(7, 50\)", shorten),
        (ValueError, r"patch_coord must be \(B, L, 2\) with L >= 1, got shape \(7, 102\)", flatten),
        (NotImplementedError, "attn_mask must be None", mask),
    ],
)
@torch.no_grad()
def test_refused_batches(error, match, change):
    model = insert_early_compressor(make(**AVERAGE), 1)
    batch = padded(images_of(dtype=torch.float32))
    expected = model(batch)
    changed = {key: value.clone() for key, value in batch.items()}
    change(changed)
    with pytest.raises(error, match=match):
        model(changed)
    assert torch.equal(model(batch), expected)


@torch.no_grad()
def test_refusals():
    model = insert_early_compressor(make(**AVERAGE), 1)
    batch = padded(images_of(dtype=torch.float32))
    with pytest.raises(NotImplementedError, match="patch_valid must come with patch_coord"):
        model.forward_features(batch["patches"], patch_valid=torch.ones(1, 49, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"B = 1 samples.*got shape \(7, 51, 32\)"):
        model.forward_features(batch["patches"], batch["patch_coord"][:1], batch["patch_valid"][:1])


@pytest.mark.parametrize("part", ["embeds", "rope"])
def test_refused_parts(part):
    model = make_with_rope()
    module = getattr(model, part)
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(NotImplementedError, match=rf"vit\.{part} must be .*, got Other"):
        insert_early_compressor(model, 1)
    model = make_with_rope()
    model._pool = model._pool
    with pytest.raises(NotImplementedError, match=r"vit must leave NaFlexVit\._pool as it is"):
        insert_early_compressor(model, 1)
    assert type(model).__name__ == "NaFlexVit"
