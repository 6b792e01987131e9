# SPDX-License-Identifier: Apache-2.0
"""Small MiniCPM-V models with random weights; what they compute, view by view in plain torch."""

import functools

import torch
from families.case import assert_close as close
from families.case import window_slots
from torch.nn import functional
from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
)
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
from transformers.models.minicpmv4_7.modeling_minicpmv4_7 import MiniCPMV4_7VisionModel

PATCH, DIM, HIDDEN, HEADS, TEXT_DIM = 8, 32, 48, 2, 40
IMAGE, START, END = 1, 2, 3  # ids of the placeholder and the marks around an image
TOWERS = {"4.6": MiniCPMV4_6VisionModel, "4.7": MiniCPMV4_7VisionModel}
MODELS = {
    "4.6": (MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, {}),
    "4.7": (
        MiniCPMV4_7Config,
        MiniCPMV4_7ForConditionalGeneration,
        {"image_start_id": START, "image_end_id": END, "slice_start_id": 4, "slice_end_id": 5}
        | {"newline_id": 6},
    ),
}
VISION = {
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "image_size": 64,
    "patch_size": PATCH,
}
TEXT = {
    "model_type": "qwen3_5_text",
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}
# A dozen products in a row, of sums of at most 4 * 48 terms, and as many norms, which divide by a
# standard deviation of about one: so many roundings, relative to the largest number on the way.
ROUNDINGS = 12 * 4 * 48
assert_close = functools.partial(close, roundings=ROUNDINGS)
# Grids that the original accepts in 16x mode, of different sizes and with a repeated one; and
# others: odd, a row, a column, a single patch, even but no multiple of 4.
EVEN = [(8, 12), (4, 4), (8, 12), (4, 8)]
ODD = [(7, 9), (1, 6), (5, 1), (1, 1), (6, 10)]


def randomized(model):
    """Return the model, in evaluation, with every parameter random, biases and norms included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            scale = 0.2 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(norm + scale * torch.randn(parameter.shape, dtype=torch.float64))
    return model.eval()


def tiny_tower(version="4.6", dtype=torch.float64, **options):
    config = TOWERS[version].config_class(**{**VISION, "insert_layer_id": 1, **options})
    return randomized(TOWERS[version](config).to(dtype))


def tiny_model(version="4.6", dtype=torch.float64, **options):
    config_class, model_class, ids = MODELS[version]
    options = {"insert_layer_id": 1, "image_token_id": IMAGE, **ids, **options}
    config = config_class(text_config=dict(TEXT), vision_config=dict(VISION), **options)
    return randomized(model_class(config).to(dtype))


def images(grids, dtype=torch.float64):
    """Pixels of packed views as the image processor lays them out, and their grids."""
    width = PATCH * sum(height * width for height, width in grids)
    return torch.randn(1, 3, PATCH, width, dtype=torch.float64).to(dtype), torch.tensor(grids)


def prompt(model, counts):
    """Inputs with one image of so many placeholders for each count, and text around them."""
    ids = [10]
    for count in counts:
        ids += [START, *[IMAGE] * count, END]
    ids = torch.tensor([[*ids, 11, 12]])
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}


def linear(module, x):
    return functional.linear(x, module.weight, module.bias)


def norm(module, x):
    return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def attention(module, x):
    q, k, v = (
        linear(p, x).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return linear(module.out_proj, (weights @ v).transpose(0, 1).flatten(1))


def layer(module, x):
    x = x + attention(module.self_attn, norm(module.layer_norm1, x))
    hidden = functional.gelu(
        linear(module.mlp.fc1, norm(module.layer_norm2, x)), approximate="tanh"
    )
    return x + linear(module.mlp.fc2, hidden)


def mlp(module, z, approximate):
    hidden = functional.gelu(
        linear(module.linear_1, norm(module.pre_norm, z)), approximate=approximate
    )
    return linear(module.linear_2, hidden)


def compressor(module, x, height, width):
    merged = []
    for present, slots in window_slots(height, width):
        y = x.clone()
        y[present] += attention(module.self_attn, norm(module.layer_norm1, x[present]))
        merged.append(y[present].mean(0) + mlp(module, y[slots].flatten(), "tanh"))
    return torch.stack(merged)


def tower_by_hand(tower, pixels, grids, use_vit_merger=True):
    """Return the tokens of each view, and its grid."""
    views, start = [], 0
    for height, width in grids:
        view = pixels[..., start * PATCH : (start + height * width) * PATCH]
        start += height * width
        x = tower.embeddings(view, target_sizes=torch.tensor([[height, width]]))[0]
        for index, module in enumerate(tower.encoder.layers):
            x = layer(module, x)
            if use_vit_merger and index == tower.config.insert_layer_id:
                x = compressor(tower.vit_merger, x, height, width)
                height, width = -(-height // 2), -(-width // 2)
        views.append((norm(tower.post_layernorm, x), (height, width)))
    return views


def connector_by_hand(merger, x, height, width):
    for stage in merger.mlp:
        slots = [slots for _, slots in window_slots(height, width)]
        x = torch.stack([mlp(stage, x[window].flatten(), "none") for window in slots])
        height, width = -(-height // 2), -(-width // 2)
    return x
