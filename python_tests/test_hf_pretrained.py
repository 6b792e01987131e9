# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and from_pretrained keep the compressor."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from families.case import assert_close
from hf_models import BACKBONES, CASES, CLIP, ROUNDINGS, SIZE, random_images
from safetensors.torch import load_file, save_file

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.integrations.transformers import compress, from_pretrained

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
    loaded = case.cls.from_pretrained(tmp_path)
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
    assert_same(transformers.Siglip2VisionModel.from_pretrained(tmp_path).train(), model.train())


def llava():
    text = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99}
    text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", **SIZE, **CLIP},
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_tower_inside_a_model(tmp_path):
    model = llava()
    with pytest.raises(NotImplementedError, match=r"its 'model\.vision_tower' is one: pass"):
        insert_early_compressor(model, 1)
    insert_early_compressor(model.model.vision_tower, 1)
    trained(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same(loaded, compress(model, layer=1).eval())  # what is around the tower counts too
    # The language model alone needs no compressor.
    transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=loaded.config.text_config)
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
    assert_same(transformers.SiglipVisionModel.from_pretrained(tmp_path / "vision"), vision)
    full = transformers.SiglipModel(config).eval()
    insert_early_compressor(full.vision_model, 1)
    trained(full).save_pretrained(tmp_path / "full")
    assert_same(transformers.SiglipModel.from_pretrained(tmp_path / "full"), full)
    vision = transformers.SiglipVisionModel.from_pretrained(tmp_path / "full")
    assert_same(vision, full.vision_model)


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
    assert_same(type(model).from_pretrained(tmp_path / "old"), old)


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


def test_auto_classes_and_shards(tmp_path):
    model = trained(insert_early_compressor(CASES["SigLIP"].make(), 1))
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(transformers.AutoModel.from_pretrained(tmp_path), model)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == model.config.num_labels
    made = transformers.AutoModel.from_config(config)
    assert made.compression == model.compression
    made.load_state_dict(model.state_dict())
    assert_same(made.eval(), model.eval())
    remove_early_compressor(made)
    assert type(type(made)(made.config)) is transformers.SiglipVisionModel


def test_labels_survive(tmp_path):
    case = CASES["DINOv2 classifier"]
    model = insert_early_compressor(case.make(id2label={0: "cat", 1: "dog", 2: "hen"}), 1)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "hen"}
    assert_same(loaded, model.eval())


def test_timm_model_inside_a_wrapper(tmp_path):
    options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=0, model_args=options
    )
    model = transformers.TimmWrapperModel(config)
    insert_early_compressor(model.timm_model, 0, form="tied")
    trained(model).save_pretrained(tmp_path)
    for cls in (transformers.TimmWrapperModel, transformers.AutoModel):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.timm_model.compression.form == "tied"
        assert_same(loaded, model.eval())


def test_models_that_share_a_config(tmp_path):
    config = CASES["SigLIP"].make().config
    cls = transformers.SiglipVisionModel
    teacher, student, other = cls(config), cls(config), cls(config)
    insert_early_compressor(student, 1)
    insert_early_compressor(other, 2, form="block")
    for model in (teacher, student, other):
        path = tmp_path / str(id(model))
        model.save_pretrained(path)
        assert_same(cls.from_pretrained(path), model.eval())
    assert type(cls(config)) is cls


class Pair(transformers.PreTrainedModel):
    config_class = transformers.SiglipVisionConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.teacher = transformers.SiglipVisionModel(config)
        self.student = transformers.SiglipVisionModel(config)
        self.post_init()


def test_one_of_two_models_with_one_config(tmp_path):
    model = Pair(CASES["SigLIP"].make().config)
    trained(insert_early_compressor(model.student, 1)).save_pretrained(tmp_path / "student")
    model.save_pretrained(tmp_path)
    loaded = Pair.from_pretrained(tmp_path)
    assert_same(loaded, model.eval())
    assert not hasattr(loaded.teacher, "compression")


INSERTS = """
import sys
import transformers
options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
config = transformers.TimmWrapperConfig(
    architecture="vit_tiny_patch16_224", num_labels=0, model_args=options
)
model = transformers.TimmWrapperModel(config)
from uhd_ops import insert_early_compressor
insert_early_compressor(model.timm_model, 0)
assert "uhd_ops.integrations.transformers" not in sys.modules
model.save_pretrained(sys.argv[1])
"""


def test_a_timm_model_is_saved_right_without_the_import(tmp_path):
    subprocess.run([sys.executable, "-c", INSERTS, tmp_path], check=True)
    loaded = transformers.TimmWrapperModel.from_pretrained(tmp_path)
    assert loaded.timm_model.compression.layers == (0,)


UNAWARE = """
import sys
import transformers
folder, tower = sys.argv[1:]
classes = transformers.AutoConfig, transformers.LlavaConfig, transformers.SiglipVisionModel
classes += transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText
for cls, path in [(cls, folder) for cls in classes] + [
    (cls, tower) for cls in (transformers.AutoModel, transformers.SiglipVisionModel)
]:
    try:
        cls.from_pretrained(path)
    except ValueError as error:
        assert "import uhd_ops.integrations.transformers" in str(error), error
    else:
        raise AssertionError(f"{cls.__name__} loads it")
assert "uhd_ops" not in sys.modules
import uhd_ops.integrations.transformers
assert transformers.AutoModel.from_pretrained(tower).compression.layers == (1,)
"""


def test_a_process_that_does_not_know_this_package_is_told(tmp_path):
    model = llava()
    insert_early_compressor(model.model.vision_tower, 1)
    model.save_pretrained(tmp_path)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    command = [sys.executable, "-c", UNAWARE, tmp_path, tmp_path / "tower"]
    subprocess.run(command, check=True)


def test_timm_refuses_what_it_would_drop(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    plain = copy.deepcopy(vit)
    torch.save(insert_early_compressor(vit, 0).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.compressor"):
        timm.create_model("vit_tiny_patch16_224", depth=2, checkpoint_path=tmp_path / "weights.pt")
    timm.models.save_for_hf(vit, tmp_path / "hub", model_args={"depth": 2})
    with pytest.raises(RuntimeError, match=r"blocks\.0\.compressor"):
        timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    timm.models.save_for_hf(plain, tmp_path / "hub", model_args={"depth": 2})
    timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)


def test_refusals(tmp_path):
    cls = transformers.SiglipVisionModel
    model = CASES["SigLIP"].make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config must describe a compressor"):
        from_pretrained(cls, tmp_path)
    with pytest.raises(TypeError, match="model_class must be"):
        from_pretrained(tmp_path)
    trained(insert_early_compressor(model, 1)).save_pretrained(tmp_path / "compressed")
    with pytest.raises(ValueError, match=r"the checkpoint holds in encoder\.layers\.1"):
        cls.from_pretrained(tmp_path / "compressed", config=CASES["SigLIP"].make().config)
    remove_early_compressor(model)
    insert_early_compressor(model, 1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.1.compressor.attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing are .*q_proj\.weight"):
        from_pretrained(cls, tmp_path)
