# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and from_pretrained keep the compressor."""

import copy
import json
import logging

import pytest
import torch
import transformers
from families.case import assert_close
from hf_models import BACKBONES, CASES, CLIP, ROUNDINGS, SIZE, random_images
from safetensors.torch import load_file, save_file

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.integrations.transformers import from_pretrained

ALL = {**CASES, **{f"{name} backbone": case for name, case in BACKBONES.items()}}
OPTIONS = {"form": "tied", "window": 3, "attention": False, "positions": "reindex"}


def trained(model):
    """Change the compressor's weights, so that no initialisation can give them back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compressor" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    assert [type(m) for m in actual.modules()] == [type(m) for m in expected.modules()]
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, value in actual.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


@torch.no_grad()
def last_state(model):
    # A loaded weight lies wherever the file has it, and products may round by alignment.
    torch.manual_seed(1)
    return copy.deepcopy(model).double()(random_images())[-1][0]


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_round_trip(case, options, tmp_path):
    model = trained(insert_early_compressor(case.make(), 1, **options))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [case.model]
    loaded = from_pretrained(case.cls, tmp_path)
    assert_same(loaded, model)
    vits = case.vit(loaded), case.vit(model)
    assert vits[0].compression == vits[1].compression
    assert_close(last_state(loaded), last_state(model), ROUNDINGS)
    assert_same(type(model).from_pretrained(tmp_path), model)  # the class itself knows it, too
    remove_early_compressor(loaded).save_pretrained(tmp_path / "removed")
    assert_same(case.cls.from_pretrained(tmp_path / "removed"), loaded)


def test_siglip2(tmp_path):
    config = transformers.Siglip2VisionConfig(**SIZE, **CLIP, num_patches=49)
    model = trained(insert_early_compressor(transformers.Siglip2VisionModel(config), 1))
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(transformers.Siglip2VisionModel, tmp_path).train(), model.train())


def test_tower_inside_a_model(tmp_path):
    text = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99}
    text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", **SIZE, **CLIP},
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match=r"its 'model\.vision_tower' is one: pass"):
        insert_early_compressor(model, 1)
    insert_early_compressor(model.model.vision_tower, 1)
    trained(model).save_pretrained(tmp_path)
    loaded = from_pretrained(transformers.LlavaForConditionalGeneration, tmp_path)
    assert_same(loaded, model)
    with torch.no_grad():
        features = loaded.get_image_features(random_images(dtype=torch.float32)).pooler_output
    assert [feature.shape for feature in features] == [(16, 32), (16, 32)]


def test_tower_out_of_a_full_model(tmp_path):
    # transformers renames the weights of a tower that comes out of a full model, and back.
    text = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SIZE, **CLIP})
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    vision = transformers.SiglipVisionModel.from_pretrained(tmp_path)
    trained(insert_early_compressor(vision, 1)).save_pretrained(tmp_path / "vision")
    names = load_file(tmp_path / "vision" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in names)
    assert_same(from_pretrained(transformers.SiglipVisionModel, tmp_path / "vision"), vision)


def test_old_names(tmp_path):
    # Checkpoints made before transformers 5 call the projections otherwise; so do their copies.
    model = CASES["DINOv2"].make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for old, new in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        weights = {
            name.replace(f"attention.{new}", f"attention.attention.{old}"): value
            for name, value in weights.items()
        }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old = trained(insert_early_compressor(type(model).from_pretrained(tmp_path), 1))
    old.save_pretrained(tmp_path / "old")
    assert any(
        ".attention.query." in name for name in load_file(tmp_path / "old/model.safetensors")
    )
    assert_same(from_pretrained(type(model), tmp_path / "old"), old)


def test_options_of_from_pretrained(tmp_path):
    model = trained(insert_early_compressor(CASES["SigLIP"].make(), 1))
    model.save_pretrained(tmp_path)
    loaded, info = from_pretrained(
        transformers.SiglipVisionModel,
        tmp_path,
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not any(info["missing_keys"])
    assert_same(loaded, model.bfloat16().eval())
    assert not loaded.training


def test_loading_without_the_compressor_is_no_secret(tmp_path, caplog):
    insert_early_compressor(CASES["SigLIP"].make(), 1).save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        plain = transformers.SiglipVisionModel.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "encoder.layers.1.compressor.mlp.fc1.weight" in caplog.text
    with pytest.raises(ValueError, match=r"integrations\.transformers\.from_pretrained"):
        insert_early_compressor(plain, 1)
    del plain.config.compression
    insert_early_compressor(plain, 1)


def test_refusals(tmp_path):
    cls = transformers.SiglipVisionModel
    model = CASES["SigLIP"].make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config must tell of a compressor"):
        from_pretrained(cls, tmp_path)
    with pytest.raises(TypeError, match="model_class must be"):
        from_pretrained(transformers.AutoModel, tmp_path)
    with pytest.raises(TypeError, match="model_class must be"):
        from_pretrained(tmp_path)
    insert_early_compressor(model, 1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.1.compressor.attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are .*q_proj\.weight"):
        from_pretrained(cls, tmp_path)


def test_wrong_options_in_the_config_leave_it_as_it_was():
    model = insert_early_compressor(CASES["SigLIP"].make(), 1)
    config = model.config
    config.compression["layers"] = [9]
    with pytest.raises(ValueError, match="layer must be in"):
        type(model)(config)
    assert config.compression["layers"] == [9]
