# SPDX-License-Identifier: Apache-2.0
"""What is special to timm's encoders of Qwen3 and DeepSeek: projectors, (B, h, w, C), wrappers."""

import copy
import pickle

import pytest
import torch
from families.qwen3_deepseek import CASES, SIZE
from timm.models.deepseek_vit import DeepseekVitClassifier
from timm.models.qwen3_vit import Qwen3VitClassifier

from uhd_ops import insert_early_compressor, remove_early_compressor

ENCODERS = ["Qwen3VitEncoder", "DeepseekVitEncoder"]
CLASSIFIERS = ["Qwen3VitClassifier", "DeepseekVitClassifier"]


def made(name, **options):
    return insert_early_compressor(CASES[name].make(**options), 1)


def pixels(height=28, width=28):
    return torch.randn(2, 3, height, width)


# ---- encoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_forward_by_kind_of_pool(name):
    x = pixels(32, 44)  # 8 x 11 patches, 4 x 6 merged
    model = made(name)
    features = model.forward_features(x)
    assert features.shape == (2, 4, 6, 32)
    assert features.is_contiguous()
    projected = 2 * 3 if name == "Qwen3VitEncoder" else 2 * 2  # 2 x 2, and 3 x 3 padded
    assert model(x).shape == (2, projected, 12)
    for pool, expected in (("avg", features.mean((1, 2))), ("", features)):
        other = made(name, global_pool=pool)
        other.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_intermediates(name):
    model, x = made(name), pixels()
    features = model.forward_features(x)
    last, chosen = model.forward_intermediates(x, 1, norm=True)
    assert torch.equal(last, features)
    assert torch.equal(chosen[0].permute(0, 2, 3, 1), features)
    last, chosen = model.forward_intermediates(x, [2, 0], stop_early=True, norm=True)
    assert torch.equal(last.permute(0, 3, 1, 2), chosen[1])
    found = model.forward_intermediates(x, [0], output_dict=True, intermediates_only=True)
    assert list(found) == ["image_intermediates"]


def test_merger_needs_an_even_merged_grid():
    message = r"merged grid has sides divisible by 2, .*; got 7 x 9 patches, merged by 2 to 4 x 5"
    x = pixels(28, 36)
    encoder = made("Qwen3VitEncoder")
    with pytest.raises(ValueError, match=message):
        encoder(x)
    assert encoder.forward_features(x).shape == (2, 4, 5, 32)
    classifier = made("Qwen3VitClassifier", encoder_pool="merge")
    for method in (classifier, classifier.forward_features, classifier.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            method(x)
    assert len(classifier.forward_intermediates(x, intermediates_only=True)) == 4


# ---- classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifier_says_what_it_holds(name):
    plain = CASES[name].make()
    model = insert_early_compressor(copy.deepcopy(plain), 1, form="tied")
    assert model.compression == model.encoder.compression
    assert model.compression.form == "tied"
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 8, 8]
    assert type(model).__name__ == f"Compressed{name}"
    assert isinstance(model, type(plain))
    assert insert_early_compressor(model, 1, form="tied") is model
    assert insert_early_compressor(model.encoder, 1, form="tied") is model.encoder
    x = pixels()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x))
        assert clone.compression == model.compression
        remove_early_compressor(clone)
        assert repr(clone) == repr(plain)
        assert clone.feature_info == plain.feature_info
        assert torch.equal(clone(x), plain(x))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_compressor_of_the_encoder_alone(name):
    plain = CASES[name].make()
    model = copy.deepcopy(plain)
    insert_early_compressor(model.encoder, 1)
    assert model(pixels()).shape == (2, 5)
    assert insert_early_compressor(model, 1) is model
    with pytest.raises(ValueError, match="vit holds a compressor already"):
        insert_early_compressor(model, 2)
    remove_early_compressor(model)
    assert repr(model) == repr(plain)

    # Inserted through the classifier, removed from the encoder: the next insertion makes it good.
    remove_early_compressor(insert_early_compressor(model, 1).encoder)
    with pytest.raises(ValueError, match="vit holds no compressor"):
        remove_early_compressor(model)
    insert_early_compressor(model, 3)
    assert [info["reduction"] for info in model.feature_info] == [4, 4, 4, 8]
    remove_early_compressor(model)
    assert repr(model) == repr(plain)
    assert model.feature_info == plain.feature_info


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_encoder_first_then_its_classifier(name):
    model, other = CASES[name].make(), CASES[name].make()
    other.load_state_dict(model.state_dict())
    insert_early_compressor(other, 1)
    insert_early_compressor(model.encoder, 1)
    assert insert_early_compressor(model, 1) is model
    assert type(model) is type(other)
    assert model.compression == other.compression
    assert model.feature_info == other.feature_info
    x = pixels()
    assert torch.equal(model(x), other(x))
    remove_early_compressor(model)
    assert type(model).__name__ == name


@pytest.mark.parametrize("cls", [Qwen3VitClassifier, DeepseekVitClassifier])
def test_subclasses_that_change_a_method(cls):
    class Other(cls):
        def forward_features(self, x):
            return super().forward_features(x)

    model = Other(**SIZE, num_classes=5)
    before = repr(model)
    with pytest.raises(NotImplementedError, match=rf"leave {cls.__name__}\.forward_features as it"):
        insert_early_compressor(model, 1)
    assert repr(model) == before
    model = cls(**SIZE, num_classes=5)
    model.encoder._pos_embed = model.encoder._pos_embed
    with pytest.raises(NotImplementedError, match=r"Encoder\._pos_embed as it is"):
        insert_early_compressor(model, 1)
    assert type(model) is cls
