# SPDX-License-Identifier: Apache-2.0
"""What is special to some vision models of transformers: padding, maps, random positions."""

import dataclasses
import inspect

import pytest
import torch
import transformers
from families.case import assert_close, randomise, window_slots
from hf_models import BACKBONES, CASES, CLIP, SIZE, centers, merge_clip, random_images
from transformers.models.dinov3_vit import modeling_dinov3_vit

from uhd_ops import (
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
)
from uhd_ops.nn import SliceEncoder
from uhd_ops.nn.block_spec import read_block

ROUNDINGS = 12 * 512  # products of at most 4 * 48 terms, a dozen in a row
SHAPES = [(5, 7), (4, 4), (1, 9), (2, 3), (1, 1)]


def make_siglip2(**options):
    config = transformers.Siglip2VisionConfig(**{**SIZE, **CLIP, "num_patches": 49, **options})
    return randomise(transformers.Siglip2VisionModel(config)).double()


def padded_batch(shapes, length=None):
    """Patches of images with these grids, in front of padding that holds noise."""
    counts = [height * width for height, width in shapes]
    length = length or max(counts)
    mask = torch.tensor([[index < count for index in range(length)] for count in counts]).long()
    return torch.randn(len(shapes), length, 48, dtype=torch.float64), mask, torch.tensor(shapes)


def siglip2_by_hand(model, pixels, shape, layer, window):
    """Hidden states and pooled output of one image without padding, of an untouched model."""
    height, width = shape
    pixels = pixels[None, : height * width]
    tokens = model.embeddings(pixels, torch.tensor([shape]))
    states = [tokens]
    for index, block in enumerate(model.encoder.layers):
        tokens = block(tokens, None)
        if index == layer:
            tokens = merge_clip(block, tokens, shape, 0, window)
        states.append(tokens)
    return states, model.head(model.post_layernorm(tokens))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("layer", "window", "length"), [(1, 2, None), (0, 3, 40), (3, 2, 40)])
def test_siglip2(layer, window, length, implementation):
    model = make_siglip2()  # eager attention of transformers rounds its weights to float32
    pixels, mask, shapes = padded_batch(SHAPES, length)
    expected = [
        siglip2_by_hand(model, image, shape, layer, window)
        for image, shape in zip(pixels, SHAPES, strict=True)
    ]
    model.set_attn_implementation(implementation)
    insert_early_compressor(model, layer, window=window)
    output = model(pixels, mask, shapes, output_hidden_states=True)
    roundings = ROUNDINGS * (2**29 if implementation == "eager" else 1)
    merged = max(-(-h // window) * -(-w // window) for h, w in SHAPES)
    assert output.last_hidden_state.shape == (len(SHAPES), merged, 32)
    for index, (states, pooled) in enumerate(expected):
        for actual, state in zip(output.hidden_states, states, strict=True):
            assert_close(actual[index, : state.shape[1]], state[0], roundings)
        assert_close(output.pooler_output[index], pooled[0], roundings)


@torch.no_grad()
def test_siglip2_merged_tokens_need_padding_where_the_patches_do_not():
    model = make_siglip2()
    shapes = [(4, 6), (3, 8)]  # 24 patches both, but 6 and 8 windows
    pixels, mask, grids = padded_batch(shapes)
    pooled = [siglip2_by_hand(model, x, s, 1, 2)[1] for x, s in zip(pixels, shapes, strict=True)]
    insert_early_compressor(model, 1)
    for given in (mask, None):
        output = model(pixels, given, grids)
        assert_close(output.pooler_output, torch.cat(pooled), ROUNDINGS)


@torch.no_grad()
def test_siglip2_with_two_merges():
    model = make_siglip2()
    pixels, mask, shapes = padded_batch(SHAPES, 40)
    expected = []
    for image, grid in zip(pixels, SHAPES, strict=True):
        tokens = model.embeddings(image[None, : grid[0] * grid[1]], torch.tensor([grid]))
        for index, block in enumerate(model.encoder.layers):
            tokens = block(tokens, None)
            if index in (0, 2):
                windows = [tokens[0, present].mean(0) for present, _ in window_slots(*grid)]
                tokens, grid = torch.stack(windows)[None], [-(-side // 2) for side in grid]
        expected.append(model.head(model.post_layernorm(tokens)))
    insert_progressive_compression(model, (0, 2), pool="mean")
    assert_close(model(pixels, mask, shapes).pooler_output, torch.cat(expected), ROUNDINGS)


@torch.no_grad()
def test_siglip2_images_do_not_meet():
    model = insert_early_compressor(make_siglip2(), 1)
    pixels, mask, shapes = padded_batch(SHAPES, 40)
    expected = model(pixels, mask, shapes).pooler_output
    pixels[0] = torch.randn(40, 48)
    pixels[mask == 0] = 1e6
    assert torch.equal(model(pixels, mask, shapes).pooler_output[1:], expected[1:])


def test_siglip2_mask_must_agree_with_the_shapes():
    model = insert_early_compressor(make_siglip2(), 1)
    pixels, mask, shapes = padded_batch(SHAPES)
    for wrong in (mask.flip(1), None, mask[:, :-1]):
        with pytest.raises(ValueError, match="pixel_attention_mask must"):
            model(pixels, wrong, shapes)


def test_siglip2_removal_and_gradients():
    model = make_siglip2()
    batch = padded_batch(SHAPES)
    before, classes = model(*batch).pooler_output, [type(m) for m in model.modules()]
    insert_early_compressor(model, 1).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(*batch).pooler_output.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None for grad in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    remove_early_compressor(model).eval().activation_checkpointing_disable()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(*batch).pooler_output, before)


@torch.no_grad()
def test_siglip2_compile():
    model = insert_early_compressor(make_siglip2(num_hidden_layers=2), 0)
    batch = padded_batch(SHAPES[:2])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # reading the grids breaks the graph
    assert torch.equal(compiled(*batch).pooler_output, model(*batch).pooler_output)


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES)
def backbone(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("size", [(28, 28), (32, 16)])
def test_feature_maps(backbone, size):
    model = backbone.exact(backbone.make())
    images = random_images(*size)
    states = backbone.by_hand(model, images)
    insert_early_compressor(model, 1)
    output = model(images)
    height, width = size[0] // 4, size[1] // 4
    prefix = states[0].shape[1] - height * width
    grids = [(height, width), *[(-(-height // 2), -(-width // 2))] * 2]
    norm = model.norm if "DINOv3" in backbone.model else model.layernorm
    assert output.hidden_states is None
    for actual, stage, grid in zip(output.feature_maps, (1, 2, 4), grids, strict=True):
        tokens = norm(states[stage])[:, prefix:]
        expected = tokens.transpose(1, 2).reshape(2, 32, *grid)
        assert_close(actual, expected, ROUNDINGS)
    values = model(images, return_dict=False)
    assert isinstance(values, tuple)
    assert all(torch.equal(a, b) for a, b in zip(values[0], output.feature_maps, strict=True))


@torch.no_grad()
def test_sequences_instead_of_maps(backbone):
    model = backbone.make(reshape_hidden_states=False)
    images = random_images(dtype=torch.float32)
    prefix = model(images).feature_maps[0].shape[1] - 49
    insert_early_compressor(model, 1)
    output = model(images, output_hidden_states=True)
    assert [y.shape[1] - prefix for y in output.feature_maps] == [49, 16, 16]
    assert len(output.hidden_states) == 5
    assert model.config.reshape_hidden_states is False


@torch.no_grad()
def test_backbone_compile():
    model = BACKBONES["DINOv2"].make(num_hidden_layers=2, out_indices=[1, 2])
    insert_early_compressor(model, 0)
    images = random_images(dtype=torch.float32)
    expected = model(images).feature_maps
    torch._dynamo.reset()
    maps = torch.compile(model, backend="eager", fullgraph=True)(images).feature_maps
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["center", "reindex"])
def test_dinov3_draws_its_coordinates_once(positions):
    drawn = {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    model = CASES["DINOv3"].make(**drawn).train()
    insert_early_compressor(model, 1, positions=positions)
    given = []
    model.model.layer[2].attention.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    torch.manual_seed(1)
    model(random_images(dtype=torch.float32))
    (cos, sin) = given[0]
    torch.manual_seed(1)
    images = random_images(dtype=torch.float32)  # draws before the model does
    places = 2 * centers((7, 7), 2, positions).float() / 7 - 1
    places = modeling_dinov3_vit.augment_patches_center_coordinates(
        places, *(drawn[f"pos_embed_{name}"] for name in ("shift", "jitter", "rescale"))
    )
    angles = 2 * torch.pi * places[:, :, None] * model.rope_embeddings.inv_freq
    angles = angles.flatten(1).repeat(1, 2)
    assert images.shape == (2, 3, 28, 28)
    # Angles of up to 2 pi * 1.3 * 1.5 * 2, rounded a few times on the way to either table.
    bound = 8 * 8 * torch.pi * torch.finfo(torch.float32).eps
    assert (cos - angles.cos()).abs().max() <= bound
    assert (sin - angles.sin()).abs().max() <= bound


@pytest.mark.parametrize("name", ["SigLIP", "CLIP", "DINOv2", "DINOv3"])
def test_masks_of_the_fine_sequence_are_refused(name):
    model = insert_early_compressor(CASES[name].make(), 1)
    images = random_images(dtype=torch.float32)
    for option in ({"attention_mask": torch.ones(2, 49)}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(option))} must be"):
            model(images, **option)


@pytest.mark.parametrize("name", CASES)
def test_signatures_stay(name):
    model = CASES[name].make()
    before = inspect.signature(model.forward)
    assert inspect.signature(insert_early_compressor(model, 1).forward) == before


PART = {**SIZE, **CLIP, "image_size": 32}


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_classifiers(name):
    config = getattr(transformers, f"{name}Config")(vision_config=PART)
    model = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    cls, images = type(model), random_images(32, 32, dtype=torch.float32)
    insert_early_compressor(model, 1)
    tokens = model.vision_model(images).last_hidden_state[:, name == "CLIP" :]
    assert tokens.shape[1] == 16
    assert torch.equal(model(images).logits, model.classifier(tokens.mean(1)))
    assert type(remove_early_compressor(model)) is cls


def test_dropout_comes_from_the_layer():
    dino = {"drop_path_rate": 0.25, "attention_probs_dropout_prob": 0.5}
    compressor = (
        insert_early_compressor(CASES["DINOv2"].make(**dino), 1).encoder.layer[1].compressor
    )
    assert (compressor.attn.drop_path, compressor.mlp.drop_path) == (0.25, 0.25)
    assert compressor.attn.attention_dropout == 0.5
    model = insert_early_compressor(CASES["CLIP"].make(attention_dropout=0.5), 1)
    assert model.encoder.layers[1].compressor.attn.attention_dropout == 0.5
    rates = {"attention_dropout": 0.5, "projection_dropout": 0.25, "hidden_dropout_prob": 0.125}
    spec = read_block(CASES["InternVL"].make(**rates).encoder.layer[1])
    assert (spec.attentions[0].attention_dropout, spec.attentions[0].proj_dropout) == (0.5, 0.25)
    assert (spec.mlps[0].hidden_dropout, spec.mlps[0].output_dropout) == (0.0, 0.125)
    rates = {"attention_dropout": 0.5, "projection_dropout": 0.25, "hidden_dropout_rate": 0.125}
    spec = read_block(CASES["Janus"].make(**rates).encoder.layers[1])
    assert (spec.attentions[0].attention_dropout, spec.attentions[0].proj_dropout) == (0.5, 0.25)
    assert (spec.mlps[0].hidden_dropout, spec.mlps[0].output_dropout) == (0.125, 0.125)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Blip", "InstructBlip", "InstructBlipVideo"])
def test_those_like_blip_2(name):
    case = dataclasses.replace(
        CASES["BLIP-2"], model=f"{name}VisionModel", config=f"{name}VisionConfig"
    )
    model, images = case.exact(case.make(attention_dropout=0.25)), random_images()
    assert read_block(model.encoder.layers[1]).attentions[0].attention_dropout == 0.25
    plain = model(images).last_hidden_state
    expected = case.outputs_of(model, case.by_hand(model, images)[-1])
    insert_early_compressor(model, 1)
    for actual, wanted in zip(model(images, return_dict=False), expected, strict=True):
        assert_close(actual, wanted, ROUNDINGS)
    (result,) = SliceEncoder(model)([images[1]]).per_view()
    assert_close(result, expected[0][1, 1:], ROUNDINGS)
    assert torch.equal(remove_early_compressor(model)(images).last_hidden_state, plain)


@torch.no_grad()
def test_aimv2_of_fixed_resolution():
    case = CASES["AIMv2"]
    model = case.exact(case.make(is_native=False))
    images = random_images()
    expected = case.outputs_of(model, case.by_hand(model, images)[-1])
    insert_early_compressor(model, 1)
    for actual, wanted in zip(model(images, return_dict=False), expected, strict=True):
        assert_close(actual, wanted, ROUNDINGS)
    assert_close(SliceEncoder(model)([*images]).per_view()[1], expected[0][1], ROUNDINGS)
    with pytest.raises(ValueError, match=r"views must have the 7 x 7 patches .* view of 2 x 5"):
        SliceEncoder(model)([images[0, :, :8, :20]])
    nearest = SliceEncoder(model, positions="nearest")([*images]).per_view()
    assert_close(nearest[1], expected[0][1], ROUNDINGS)


def siglip(**options):
    config = transformers.SiglipVisionConfig(**{**PART, **options})
    return transformers.SiglipVisionModel(config)


def full_clip():
    config = transformers.CLIPConfig(text_config={**CLIP, "hidden_size": 32}, vision_config=PART)
    return transformers.CLIPModel(config)


def siglip2_classifier():
    config = transformers.Siglip2Config(vision_config={**PART, "num_patches": 49})
    return transformers.Siglip2ForImageClassification(config)


def other_forward():
    class OtherForward(transformers.SiglipVisionModel):
        def forward(self, pixel_values, **kwargs):
            return super().forward(pixel_values, **kwargs)

    return OtherForward(siglip().config)


def other_linear():
    model = siglip()
    model.encoder.layers[1].mlp.fc1 = torch.nn.Identity()
    return model


def wrapped_layer():
    model = siglip()
    model.encoder.layers[2] = torch.nn.Sequential(model.encoder.layers[2])
    return model


def other_norm():
    model = CASES["InternVL"].make()
    model.encoder.layer[1].attention.q_norm = torch.nn.RMSNorm(32)
    return model


REFUSED = {
    "layer.self_attn.q_norm must be Identity, got LayerNorm": lambda: CASES["Janus"].make(
        use_qk_norm=True  # over all heads, but called head by head, so it cannot run
    ),
    "layer.attention.q_norm must be LayerNorm or InternVLVisionRMSNorm, got RMSNorm": other_norm,
    "its 'vision_model' is one: pass that": full_clip,
    "vit must leave SiglipVisionModel.forward as it is": other_forward,
    "layer.mlp.fc1 must be Linear": other_linear,
    "vit.encoder.layers.2 must be SiglipEncoderLayer": wrapped_layer,
    "layer.mlp.activation_fn must be": lambda: siglip(hidden_act="mish"),
    "averages over the patches that pixel_attention_mask marks": siglip2_classifier,
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    model = REFUSED[message]()
    classes = [type(m) for m in model.modules()]
    names, config = list(model.state_dict()), model.config.to_dict()
    with pytest.raises(NotImplementedError, match=message):
        insert_early_compressor(model, 1)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
