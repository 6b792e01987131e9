# SPDX-License-Identifier: Apache-2.0
"""compress puts a compressor into a whole vision-language model, and all that counts follows."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import transformers
from families.case import assert_close
from hf_models import ROUNDINGS
from PIL import Image
from vlms import QWEN3_5, VLMS
from vlms.around import pi0, t5gemma2
from vlms.case import LAYER, Vlm, image_id, siglip, tokenizer
from vlms.square import gemma3, llava

import uhd_ops
from uhd_ops.integrations.transformers import compress, decompress
from uhd_ops.integrations.transformers.vlm_models import entry_of, patch_size_for

# transformers' own, about its own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LLAVA, NEXT, ONEVISION = (
    next(vlm for vlm in VLMS if vlm.name == name)
    for name in ("llava", "llava_next", "llava_onevision")
)


def made(vlm):
    torch.manual_seed(0)
    model, processor = vlm.make()
    return model.eval(), processor


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def towers(model):
    return [module for module in model.modules() if hasattr(module, "compression")]


def assert_same_state(model, state, types):
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("vlm", VLMS, ids=[vlm.name for vlm in VLMS])
def test_life_of_a_compressed_model(vlm, tmp_path):
    """Its processor counts; it learns, generates, gives its compressor up, is saved and loaded."""
    model, processor = made(vlm)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    inputs = vlm.inputs(processor)
    assert vlm.num_image_tokens(inputs) == vlm.tokens[0]
    before = logits(model, inputs)

    assert compress(model, processor, LAYER) is model
    assert compress(model, processor, LAYER) is model  # again is the same
    merged = vlm.inputs(processor)
    assert vlm.num_image_tokens(merged) == vlm.tokens[1]
    generated = model.generate(**merged, max_new_tokens=3, do_sample=False)
    assert merged["input_ids"].shape[1] < generated.shape[1]

    decompress(model, processor)
    assert_same_state(model, state, types)
    assert vlm.num_image_tokens(vlm.inputs(processor)) == vlm.tokens[0]
    assert_close(logits(model, inputs), before, ROUNDINGS)

    compress(model, processor, LAYER, form="tied")
    train(model, merged)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = vlm.inputs(transformers.AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(inputs["input_ids"], merged["input_ids"])
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert_close(logits(again, inputs), logits(model, merged), ROUNDINGS)


@pytest.mark.parametrize("vlm", VLMS, ids=[vlm.name for vlm in VLMS])
def test_replaced_methods_have_the_parameters_of_the_original(vlm):
    """By the names of parameters, transformers finds out what it can pass."""
    model, _ = made(vlm)
    inner = next(module for module in model.modules() if entry_of(module))
    for name, mixin in entry_of(inner).parts.items():
        original = type(inner.get_submodule(name))
        for method in (method for method in vars(mixin) if hasattr(original, method)):
            if not method.startswith("__") and method != "get_rope_index":
                both = (getattr(cls, method) for cls in (mixin, original))
                ours, theirs = (list(inspect.signature(one).parameters) for one in both)
                assert ours == theirs, method


def train(model, inputs):
    labels = inputs["input_ids"].clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    # Of Video-LLaVA's two towers, one sees the picture.
    assert any(all(gradient_of(tower)) for tower in towers(model))


def gradient_of(tower):
    """Whether each parameter of a tower's compressor has got one."""
    parameters = (p for name, p in tower.named_parameters() if ".compressor." in name)
    return [p.grad is not None and p.grad.count_nonzero() > 0 for p in parameters]


@pytest.mark.parametrize("vlm", [NEXT, ONEVISION], ids=lambda vlm: vlm.name)
def test_tiles_are_put_together_on_the_merged_grid(vlm):
    """As by the same model with patches of twice the size, whose grids are those."""
    model, _ = made(vlm)
    compress(model, layer=LAYER)
    coarse = copy.deepcopy(model.config)
    coarse.vision_config.patch_size = 10  # 3 x 3 of 30 px, as 5 x 5 patches become
    coarse = type(model)(coarse)
    sizes = torch.tensor([[40, 70], [15, 40]])
    tiles = [torch.randn(5, 9, 32), torch.randn(3, 9, 32)]
    options = {"image_newline": torch.randn(32)}
    if vlm is NEXT:
        options["vision_feature_select_strategy"] = "full"
    packed = model.model.pack_image_features(tiles, sizes, **options)
    expected = coarse.model.pack_image_features(tiles, sizes, **options)
    assert packed[1].tolist() == expected[1].tolist()
    for actual, right in zip(packed[0], expected[0], strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("side", [40, 44], ids=["even", "odd"])
def test_packed_images_are_split_on_the_merged_grid(side):
    """Each of two images in one call has the features that it has alone, and as many as tokens."""
    vlm = next(vlm for vlm in VLMS if vlm.name == "mistral3")
    model, _ = made(vlm)
    compress(model, layer=LAYER)
    images, sizes = torch.randn(2, 3, side, 56), torch.tensor([[32, 56], [side, 24]])
    with torch.no_grad():
        both = model.model.get_image_features(images, sizes).pooler_output
        for features, image, size in zip(both, images, sizes, strict=True):
            cropped = image[None, :, : size[0], : size[1]]
            (alone,) = model.model.get_image_features(cropped, size[None]).pooler_output
            assert_close(features, alone, ROUNDINGS)
    # 8 x 14 and 10 or 11 x 6 patches, merged twice; the connector drops half a square, as it does.
    assert [len(features) for features in both] == [2 * 3, (side // 4 + 1) // 2 // 2 * 1]


QWENS = [vlm for vlm in VLMS if vlm.name.startswith(("qwen", "glm"))]


@pytest.mark.parametrize("vlm", QWENS, ids=lambda vlm: vlm.name)
def test_patches_in_blocks_of_merged_blocks(vlm):
    """The tower sees what it would see in its own order, whatever the processor's."""
    model, processor = made(vlm)
    picture = Image.fromarray(np.arange(32 * 64 * 3, dtype=np.uint8).reshape(32, 64, 3))
    fine = processor.image_processor(picture, return_tensors="pt")
    compress(model, processor, LAYER)
    coarse = processor.image_processor(picture, return_tensors="pt")
    assert torch.equal(fine["image_grid_thw"], coarse["image_grid_thw"])
    assert not torch.equal(fine["pixel_values"], coarse["pixel_values"])
    with torch.no_grad():
        alone = model.model.visual(fine["pixel_values"], grid_thw=fine["image_grid_thw"])
        whole = model.model.get_image_features(**coarse)
        frames = (
            coarse["pixel_values"].repeat(2, 1),
            coarse["image_grid_thw"] * torch.tensor([2, 1, 1]),
        )
        video = model.model.get_video_features(*frames)
    assert_close(torch.cat(whole.pooler_output), alone.pooler_output, ROUNDINGS)
    assert_close(torch.cat(video.pooler_output), alone.pooler_output.repeat(2, 1), ROUNDINGS)


@pytest.mark.parametrize("vlm", QWENS, ids=lambda vlm: vlm.name)
def test_positions_in_the_language_model_are_those_of_the_tokens_left(vlm):
    model, processor = made(vlm)
    compress(model, processor, LAYER)
    inputs = vlm.inputs(processor)
    kinds = inputs["mm_token_type_ids"]
    positions, delta = model.model.get_rope_index(
        inputs["input_ids"], kinds, image_grid_thw=inputs["image_grid_thw"]
    )
    start = 3  # "what is in", then 2 x 4 tokens of the picture
    rows, cols = torch.meshgrid(torch.arange(2), torch.arange(4), indexing="ij")
    expected = start + torch.stack([torch.zeros(8), rows.flatten(), cols.flatten()])
    assert torch.equal(positions[-3:, 0, kinds[0] == 1], expected.long())
    assert delta.item() == 4 - 8  # they take four positions


def test_resampler_sees_the_merged_tokens_of_an_image_and_no_padding():
    """Each of two images in one call has the features that it has alone."""
    vlm = next(vlm for vlm in VLMS if vlm.name == "idefics2")
    model, _ = made(vlm)
    compress(model, layer=LAYER)
    images, mask = torch.randn(1, 2, 3, 32, 28), torch.zeros(1, 2, 32, 28, dtype=torch.bool)
    sizes = [(32, 20), (12, 28)]
    for index, (height, width) in enumerate(sizes):
        mask[0, index, :height, :width] = True
    with torch.no_grad():
        (both,) = model.model.get_image_features(images, mask).pooler_output
        for index, (height, width) in enumerate(sizes):
            cropped = images[:, index : index + 1, :, :height, :width]
            (alone,) = model.model.get_image_features(cropped).pooler_output
            assert_close(both[3 * index : 3 * index + 3], alone, ROUNDINGS)


# Frames of a video, and the placeholders for them: of 2 x 2 or 3 x 3 merged tokens, which the first
# two halve once more; pairs of frames with 2 x 4 tokens, which Qwen3-VL's processor makes smaller.
VIDEOS = {
    "llava_next_video": (3, 3 * 1),
    "llava_onevision": (3, 3 * 4 + 1),
    "video_llava": (8, 8 * 5),
    "internvl": (4, 4 * 4),
    "qwen2_vl": (4, 2 * 8),
    "qwen2_5_vl": (4, 2 * 8),
    "qwen3_vl": (4, 2 * 2),
}


@pytest.mark.parametrize("vlm", [v for v in VLMS if v.name in VIDEOS], ids=lambda vlm: vlm.name)
def test_videos(vlm):
    model, processor = made(vlm)
    compress(model, processor, LAYER)
    frames, tokens = VIDEOS[vlm.name]
    video = torch.randint(0, 256, (frames, 3, 32, 64), dtype=torch.uint8)
    inputs = processor(text="what is <video> ?", videos=[video], return_tensors="pt")
    ids = torch.tensor([image_id("<video>"), image_id()])  # InternVL has one token for both
    assert torch.isin(inputs["input_ids"], ids).sum() == tokens
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("make", "counts"), [(pi0, (25, 9)), (t5gemma2, (16, 16))], ids=["pi0", "t5gemma2"]
)
def test_models_around_one(make, counts):
    """PaliGemma's and Gemma 3's ways of counting, inside models that are more than that."""
    torch.manual_seed(0)
    model, processor, inputs = make()
    assert (inputs()["input_ids"] == image_id()).sum() == counts[0]
    compress(model, processor, LAYER)
    assert (inputs()["input_ids"] == image_id()).sum() == counts[1]
    model.eval()(**inputs()).loss.backward()
    assert len(towers(model)) == 1


def test_qwen3_5(tmp_path):
    model, processor = made(QWEN3_5)
    assert QWEN3_5.num_image_tokens(QWEN3_5.inputs(processor)) == QWEN3_5.tokens[0]
    compress(model, processor, LAYER)
    inputs = QWEN3_5.inputs(processor)
    assert QWEN3_5.num_image_tokens(inputs) == QWEN3_5.tokens[1]
    train(model, inputs)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert_close(logits(again, inputs), logits(model.eval(), inputs), ROUNDINGS)


def test_tower_alone_is_enough_to_come_back_whole(tmp_path):
    """A model whose tower got its compressor without compress is one that counts, after loading."""
    model, processor = made(NEXT)
    uhd_ops.insert_early_compressor(model.model.vision_tower, LAYER)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    compress(model, processor, LAYER)
    inputs = NEXT.inputs(processor)
    assert_close(logits(again, inputs), logits(model, inputs), ROUNDINGS)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(copied):
    model, processor = made(NEXT)
    compress(model, processor, LAYER)
    other = copied(model)
    inputs = NEXT.inputs(processor)
    assert_close(logits(other, inputs), logits(model, inputs), ROUNDINGS)
    decompress(other)
    assert towers(model)
    assert not towers(other)


def test_a_new_model_of_the_class_counts_its_own_patches():
    model, processor = made(NEXT)
    fine = NEXT.inputs(processor)
    compress(model, processor, LAYER)
    fresh = type(model.model)(model.config)
    assert not towers(fresh)
    fresh(**fine)


def refused(error, match, model, processor, *args, **options):
    """Assert that compress fails, and that nothing has changed."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    counts = repr(processor)
    with pytest.raises(error, match=match):
        compress(model, processor, *args, **options)
    assert_same_state(model, state, types)
    assert repr(processor) == counts


class Other(torch.nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_refusals():
    model, processor = made(LLAVA)
    refused(
        ValueError, "layer must be below 3.*vision_feature_layer=-2.*got 3", model, processor, 3
    )
    refused(ValueError, "window must be at least 2, got 1", model, processor, 1, window=1)
    refused(TypeError, "unexpected keyword argument 'windows'", model, processor, 1, windows=2)
    refused(
        ValueError, "processor must be that of the model, with patch_size", model, tokenizer(), 1
    )
    processor.patch_size = 7
    refused(ValueError, "by patch_size=6, got patch_size=7", model, processor, 1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        compress("llava")
    tower = model.model.vision_tower
    refused(NotImplementedError, "pass it to uhd_ops.insert_early_compressor", tower, None)
    refused(NotImplementedError, "'tower' takes one by itself", Other(tower=tower), None)
    refused(NotImplementedError, "nothing in it is a vision", Other(x=torch.nn.ReLU()), None)
    with pytest.raises(ValueError, match="model holds no compressor in its 'vision_tower'"):
        decompress(model)


def test_removal_from_a_model_that_somebody_extended():
    model, processor = made(NEXT)
    compress(model, processor, LAYER)
    counted = processor.patch_size

    class Extended(type(model.model)):
        pass

    model.model.__class__ = Extended
    with pytest.raises(NotImplementedError, match="got Extended: undo what extended it"):
        decompress(model, processor)
    assert towers(model)
    assert processor.patch_size == counted


def test_numbers_that_do_not_fit():
    # 9 tokens on a side become 5, but floor(18 / patch_size) is never 5.
    model, processor = made(Vlm("llava", llava("Llava", siglip(18, 2), 18), (81, 25)))
    refused(ValueError, "divides into 5 tokens on a side.*got 18", model, processor, 1)
    compress(model, layer=1)  # something else may count
    model, processor = made(Vlm("gemma3", gemma3(siglip(24, 4), 24, 4), (4, 4), "<boi>"))
    refused(ValueError, "a multiple of 2 tokens on a side.*got 3", model, processor, 1)
    model, processor = made(LLAVA)
    model.config.vision_config.image_size = (30, 24)
    refused(ValueError, "square images.*got image_size=\\(30, 24\\)", model, processor, 1)


def test_a_second_tower_that_is_refused_leaves_the_first_alone():
    model, processor = made(next(vlm for vlm in VLMS if vlm.name == "video_llava"))
    second = model.model.video_tower
    uhd_ops.insert_early_compressor(second, LAYER, form="tied")
    with pytest.raises(ValueError, match="vit holds a compressor already"):
        compress(model, processor, LAYER)
    assert towers(model) == [second]
    assert processor.patch_size == 6


@pytest.mark.parametrize(
    ("size", "side", "patch_size"), [(336, 12, 28), (384, 14, 27), (30, 3, 10)]
)
def test_patch_size_for(size, side, patch_size):
    assert patch_size_for(size, side) == patch_size
    assert size // patch_size == side


def test_own_subclass_is_known():
    model, _ = made(LLAVA)

    class MyLlava(type(model.model)):
        pass

    model.model.__class__ = MyLlava
    assert entry_of(model.model) is entry_of(made(LLAVA)[0].model)
