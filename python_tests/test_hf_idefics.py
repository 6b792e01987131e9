# SPDX-License-Identifier: Apache-2.0
"""The towers of Idefics 2, Idefics 3 and SmolVLM: images padded to one size, and their VLMs."""

import dataclasses

import pytest
import torch
import transformers
from families.case import assert_close
from hf_models import CASES, CLIP, ROUNDINGS, SIZE, idefics_by_hand, random_images
from test_hf_pretrained import assert_same, trained

from uhd_ops import (
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
)
from uhd_ops.nn import SliceEncoder
from uhd_ops.retrofit.padded_layout import FramedLayout

# Whole windows and ragged ones, one row, one patch; the batch has 7 x 9 patches, no image has.
SIDES = [(5, 7), (4, 4), (1, 9), (7, 2), (1, 1)]
FRAME = (7, 9)
NAMES = ["Idefics2", "Idefics3", "SmolVLM"]


def make(name, **options):
    case = CASES["SmolVLM"]
    names = {"model": f"{name}VisionTransformer", "config": f"{name}VisionConfig"}
    return dataclasses.replace(case, **names).make(**options).double()


def padded_batch(sides=SIDES, frame=FRAME):
    """Images with noise outside of their patches, and the mask of these."""
    mask = torch.zeros(len(sides), *frame, dtype=torch.bool)
    for marks, (height, width) in zip(mask, sides, strict=True):
        marks[:height, :width] = True
    return random_images(4 * frame[0], 4 * frame[1], len(sides)), mask


def own(tokens, frame, sides, window=1):
    """The tokens of one image in a sequence for the whole frame."""
    frame, sides = ([-(-side // window) for side in pair] for pair in (frame, sides))
    return tokens.unflatten(0, frame)[: sides[0], : sides[1]].flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layer", "window", "implementation"), [(1, 2, "sdpa"), (0, 3, "sdpa"), (3, 2, "eager")]
)
def test_each_image_alone(name, layer, window, implementation):
    model = make(name)
    images, mask = padded_batch()
    alone = [
        idefics_by_hand(model, x[None, :, : 4 * h, : 4 * w], layer, window)
        for x, (h, w) in zip(images, SIDES, strict=True)
    ]
    model.set_attn_implementation(implementation)
    insert_early_compressor(model, layer, window=window)
    output = model(images, mask, output_hidden_states=True)
    # Eager attention of transformers rounds its weights to float32.
    roundings = ROUNDINGS * (2**29 if implementation == "eager" else 1)
    assert output.last_hidden_state.shape[1] == -(-7 // window) * -(-9 // window)
    for index, (states, sides) in enumerate(zip(alone, SIDES, strict=True)):
        for depth, (actual, state) in enumerate(zip(output.hidden_states, states, strict=True)):
            side = window if depth > layer else 1
            assert_close(own(actual[index], FRAME, sides, side), state[0], roundings)
        last = own(output.last_hidden_state[index], FRAME, sides, window)
        assert_close(last, model.post_layernorm(states[-1][0]), roundings)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_leak(name):
    model = insert_early_compressor(make(name), 1)
    images, mask = padded_batch()
    outputs = [model(images, mask).last_hidden_state]
    spoilt = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).logical_not()[:, None]
    outputs.append(model(images.masked_fill(spoilt, 1e6), mask).last_hidden_state)

    def poison(module, args, out):  # what the compressor is given
        return out.masked_fill(~mask.flatten(1)[..., None], float("nan"))

    model.encoder.layers[1].mlp.register_forward_hook(poison)
    outputs.append(model(images, mask).last_hidden_state)
    for other in outputs[1:]:
        assert other.isfinite().all()
        for before, after, sides in zip(outputs[0], other, SIDES, strict=True):
            assert torch.equal(own(before, FRAME, sides, 2), own(after, FRAME, sides, 2))


@torch.no_grad()
def test_a_mask_without_padding_and_an_image_without_patches():
    model = insert_early_compressor(make("Idefics3"), 1)
    images, mask = padded_batch()
    expected = model(images).last_hidden_state
    assert torch.equal(model(images, torch.ones_like(mask)).last_hidden_state, expected)
    mask[:3], mask[3:] = True, False
    output = model(images, mask).last_hidden_state
    assert_close(output[:3], expected[:3], ROUNDINGS)
    assert output.isfinite().all()


def test_masks_that_mark_no_corner_are_refused():
    model = insert_early_compressor(make("Idefics3"), 1)
    images, mask = padded_batch()
    hole = mask.clone()
    hole[0, 2, 2] = False
    for wrong, images_of_it in ((mask.flip(1), r"\[0, 1, 2, 4\]"), (hole, r"\[0\]")):
        with pytest.raises(ValueError, match=f"top-left corner .* those of {images_of_it} do"):
            model(images, wrong)
    for wrong in (mask[:, :6], mask[:4], mask.flatten(1)):
        with pytest.raises(ValueError, match=r"patch_attention_mask must have shape \(5, 7, 9\)"):
            model(images, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_removal_and_gradients(name):
    model = make(name)
    batch = padded_batch()
    before, classes = model(*batch).last_hidden_state, [type(m) for m in model.modules()]
    insert_early_compressor(model, 1).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        out = model(*batch).last_hidden_state
        with torch.no_grad():  # as many tokens, another frame
            model(*padded_batch([(3, 4)] * 5, (9, 7)))
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in gradients[0][:-1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    remove_early_compressor(model).eval().activation_checkpointing_disable()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(*batch).last_hidden_state, before)


@torch.no_grad()
def test_compile():
    model = insert_early_compressor(make("SmolVLM", num_hidden_layers=2), 0)
    images, mask = padded_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # reading the grids breaks the graph
    for given in (mask, torch.ones_like(mask)):
        expected = model(images, given).last_hidden_state
        assert torch.equal(compiled(images, given).last_hidden_state, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images).last_hidden_state, model(images).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(
    ("all_sides", "frame"), [(SIDES, FRAME), ([(7, 9), (8, 10)], (8, 10))], ids=["padded", "full"]
)
def test_slice_encoder_takes_images_of_any_aspect_ratio(all_sides, frame):
    """So does the model, also where the merged tokens need no padding and the patches do."""
    model = insert_early_compressor(make("Idefics3"), 1)
    images, mask = padded_batch(all_sides, frame)
    views = [x[:, : 4 * h, : 4 * w] for x, (h, w) in zip(images, all_sides, strict=True)]
    packed = SliceEncoder(model)(views).per_view()
    output = model(images, mask).last_hidden_state
    for tokens, padded, sides in zip(packed, output, all_sides, strict=True):
        assert_close(tokens, own(padded, frame, sides, 2), ROUNDINGS)


@torch.no_grad()
def test_several_merges_of_padded_images():
    model = insert_progressive_compression(make("SmolVLM"), (0, 2))
    images, mask = padded_batch()
    views = [x[:, : 4 * h, : 4 * w] for x, (h, w) in zip(images, SIDES, strict=True)]
    output = model(images, mask).last_hidden_state
    assert output.shape[1] == 2 * 3
    for view, padded, sides in zip(views, output, SIDES, strict=True):
        alone = model(view[None]).last_hidden_state[0]
        assert_close(own(padded, FRAME, sides, 4), alone, ROUNDINGS)


def test_layouts_differ_by_frame_and_by_grids():
    """By which a block finds its layout again in a backward pass."""
    batches = ([(3, 4)], (7, 9)), ([(3, 4)], (9, 7)), ([(4, 3)], (7, 9))
    places = [FramedLayout.of_mask(padded_batch(*batch)[1], "cpu").places for batch in batches]
    assert len(set(places)) == 3


def make_vlm(name):
    text = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99}
    text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    options = {"scale_factor": 2} if name != "Idefics2" else {}
    if name == "Idefics2":
        options["perceiver_config"] = {
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        }
    config = getattr(transformers, f"{name}Config")(
        vision_config={**SIZE, **CLIP}, text_config=text, pad_token_id=0, **options
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_towers_of_whole_models(name, tmp_path):
    model = make_vlm(name)
    with pytest.raises(NotImplementedError, match=r"its 'model\.vision_model' is one: pass"):
        insert_early_compressor(model, 1)
    insert_early_compressor(model.model.vision_model, 1)
    trained(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same(loaded.model.vision_model, model.model.vision_model)
    if name != "Idefics2":  # whose resampler asks for a mask of as many tokens
        # 8 x 8 patches become 4 x 4 tokens, and 2 x 2 for the language model.
        images = random_images(32, 32, 3, torch.float32)[None]
        features = loaded.get_image_features(images).pooler_output
        assert [feature.shape for feature in features] == [(12, 32)]
