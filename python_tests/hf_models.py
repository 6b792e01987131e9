# SPDX-License-Identifier: Apache-2.0
"""Small random vision models of transformers, each with its compressor as a loop over windows."""

import dataclasses
import importlib
import inspect
import math

import torch
import transformers
from families.case import Case, merge_batch, mlp_mean, randomise
from transformers.models.aimv2 import modeling_aimv2
from transformers.models.internvl import modeling_internvl

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,  # a 7 x 7 grid
    "patch_size": 4,
}
ROUNDINGS = 12 * 512  # products of at most 4 * 48 terms, a dozen in a row


@dataclasses.dataclass(frozen=True)
class HfCase:
    """A class of models.

    Attributes:
        model: Name of the class.
        config: Name of the class of its config.
        options: Of the config, beside SIZE.
        trunk: Name of the submodule that is the ViT; empty for the model itself.
        layers: Name of its list of layers.
        resizes: Options of a call with images of another size.
        by_hand: ``by_hand(vit, images, ...)``: the hidden states with a compressor; see below.
    """

    model: str
    config: str
    options: dict
    by_hand: object
    trunk: str = ""
    layers: str = "encoder.layers"
    resizes: dict = dataclasses.field(default_factory=dict)

    @property
    def cls(self):  # not all of them are names of the package itself
        configuration = getattr(transformers, self.config).__module__
        module = importlib.import_module(configuration.replace(".configuration_", ".modeling_"))
        return getattr(module, self.model)

    def make(self, **options):
        config = getattr(transformers, self.config)(**{**SIZE, **self.options, **options})
        return randomise(self.cls(config))

    def exact(self, model):
        """The model in float64 throughout."""
        if "DINOv3" in self.model:
            model.rope_embeddings = ExactRope(model.rope_embeddings.inv_freq)
        return model.double()

    def vit(self, model):
        return model.get_submodule(self.trunk)

    def options_for(self, x):
        return self.resizes if x.shape[2:] != (28, 28) else {}

    def outputs_of(self, model, last):
        """The first two outputs of a model by what leaves its last layer."""
        vit = self.vit(model)
        if self.by_hand is idefics_by_hand:
            return (vit.post_layernorm(last),)
        if self.by_hand is internvl_by_hand:
            return (vit.layernorm(last),)
        if self.by_hand is aimv2_by_hand:
            normed = vit.rms_norm(last)
            return normed, vit.head(normed)
        if "Janus" in self.model or "Blip" in self.model:
            normed = vit.post_layernorm(last)
            return normed, vit.post_layernorm(normed[:, 0])
        if "Siglip" in self.model:
            normed = vit.post_layernorm(last)
            return normed, vit.head(normed) if vit.use_head else None
        if self.trunk == "vision_model":
            return model.visual_projection(vit.post_layernorm(last[:, 0])), last
        if "CLIP" in self.model:
            return last, vit.post_layernorm(last[:, 0])
        normed = (vit.norm if "DINOv3" in self.model else vit.layernorm)(last)
        if self.trunk == "dinov2":
            return (model.classifier(torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1)),)
        return normed, normed[:, 0]

    def run_layer(self, model, index, x):
        """An untouched layer on tokens ``(1, L, C)``, all at the same place."""
        positions = {}
        if "DINOv3" in self.model:
            angles = torch.zeros(x.shape[1], 16, dtype=x.dtype)
            positions["position_embeddings"] = angles.cos(), angles.sin()
        layer = self.vit(model).get_submodule(self.layers)[index]
        return layer(x, None, **positions) if positions else call(layer, x)

    def as_case(self):
        """What the battery of families takes."""

        def by_hand(model, x, **options):
            states = self.by_hand(self.vit(model), x, **options)
            return states[1:], self.outputs_of(model, states[-1])[0]

        return Case(
            lambda depth=4: self.make(num_hidden_layers=depth),
            by_hand,
            sizes=((12, 40), (32, 20), (8, 16)),
            images=lambda model, batch=2, dtype=torch.float32, size=None: random_images(
                *(size or (28, 28)), batch=batch, dtype=dtype
            ),
            blocks=f"{self.trunk}.{self.layers}".lstrip("."),
            num_prefix=lambda model: 0,  # states have them
            run_block=self.run_layer,
            exact=self.exact,
            run=lambda model, x: model(x, **self.options_for(x))[0],
            patches=lambda model, x: model(
                x, output_hidden_states=True, **self.options_for(x)
            ).hidden_states[1:],
            checkpoint=lambda model: model.activation_checkpointing_enable(),
        )


def random_images(height=28, width=28, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, dtype=dtype)


def call(module, x):
    """Run a layer or an attention on tokens; most of them want to be told of a mask."""
    masked = "attention_mask" in inspect.signature(module.forward).parameters
    return module(x, None) if masked else module(x)


def merge_clip(layer, tokens, grid, prefix, window, attention=True):
    if hasattr(layer, "rms_norm1"):  # AIMv2
        norms, inner, ffn = (layer.rms_norm1, layer.rms_norm2), layer.attention, layer.ffn
    else:
        norms, inner, ffn = (layer.layer_norm1, layer.layer_norm2), layer.self_attn, layer.mlp

    def attend(x, present):
        return call(inner, norms[0](x[None]))[0][0]

    def mlp(z):
        return mlp_mean(norms[1], ffn, z)

    return merge_batch(tokens, grid, prefix, window, attend if attention else None, mlp)


def clip_by_hand(vit, images, layer=1, window=2, positions="center", attention=True):
    """Hidden states of an untouched model like CLIP with the compressor behind ``layer``.

    Returns:
        What enters the first layer and what leaves each layer.
    """
    grid = images.shape[-2] // 4, images.shape[-1] // 4
    tokens = vit.embeddings(images, interpolate_pos_encoding=grid != (7, 7))
    tokens = getattr(vit, "pre_layrnorm", lambda x: x)(tokens)
    return layers_by_hand(vit, tokens, grid, layer, window, attention)


def idefics_by_hand(vit, images, layer=1, window=2, positions="center", attention=True):
    """As above, for Idefics 2, Idefics 3 and SmolVLM; for images without padding."""
    grid = images.shape[-2] // 4, images.shape[-1] // 4
    tokens = vit.embeddings(images, torch.ones(len(images), *grid, dtype=torch.bool))
    return layers_by_hand(vit, tokens, grid, layer, window, attention)


def aimv2_by_hand(vit, images, layer=1, window=2, positions="center", attention=True):
    """As above, for AIMv2."""
    grid = images.shape[-2] // 4, images.shape[-1] // 4
    return layers_by_hand(vit, vit.embeddings(images), grid, layer, window, attention)


def layers_by_hand(vit, tokens, grid, layer, window, attention):
    states = [tokens]
    for index, block in enumerate(vit.encoder.layers):
        tokens = call(block, tokens)
        if index == layer:
            prefix = tokens.shape[1] - grid[0] * grid[1]
            tokens = merge_clip(block, tokens, grid, prefix, window, attention)
        states.append(tokens)
    return states


def centers(grid, window, positions):
    """Row and column of every merged token, on the fine grid, in tokens; (0.5, 0.5) the first."""
    spans = []
    for side in grid:
        starts = range(0, side, window)
        if positions == "center":
            spans.append([(start + min(start + window, side)) / 2 for start in starts])
        else:
            spans.append([index + 0.5 for index in range(len(starts))])
    return torch.tensor([(row, col) for row in spans[0] for col in spans[1]], dtype=torch.float64)


def dinov3_table(inverse, coordinates, grid):
    """Cosines and sines at coordinates in tokens, as DINOv3 defines them."""
    scaled = 2 * coordinates / torch.tensor(grid) - 1
    angles = 2 * math.pi * scaled[:, :, None] * inverse
    angles = angles.flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


class ExactRope(torch.nn.Module):
    """Stands in for DINOv3's rotary embeddings, which are float32 whatever the model is."""

    def __init__(self, inverse):
        super().__init__()
        self.inv_freq = inverse.double()

    def forward(self, images):
        grid = images.shape[-2] // 4, images.shape[-1] // 4
        return dinov3_table(self.inv_freq, centers(grid, 1, "center"), grid)


def dino_by_hand(vit, images, layer=1, window=2, positions="center", attention=True):
    """As above, for DINOv2 and DINOv3."""
    grid = images.shape[-2] // 4, images.shape[-1] // 4
    tokens = vit.embeddings(images)
    prefix = tokens.shape[1] - grid[0] * grid[1]
    tables = {}
    if hasattr(vit, "rope_embeddings"):
        tables["position_embeddings"] = vit.rope_embeddings(images)
    fine = tables
    states = [tokens]
    for index, block in enumerate(
        vit.encoder.layer if hasattr(vit, "encoder") else vit.model.layer
    ):
        tokens = block(tokens, **tables)
        if index == layer:

            def attend(x, present, block=block):
                own = {name: tuple(t[present] for t in pair) for name, pair in fine.items()}
                return block.layer_scale1(block.attention(block.norm1(x[None]), **own)[0])[0]

            def mlp(z, block=block):
                return block.layer_scale2(mlp_mean(block.norm2, block.mlp, z))

            chosen = attend if attention else None
            tokens = merge_batch(tokens, grid, prefix, window, chosen, mlp)
            if tables:
                places = centers(grid, window, positions)
                table = dinov3_table(vit.rope_embeddings.inv_freq, places, grid)
                tables = {"position_embeddings": table}
        states.append(tokens)
    return states


def internvl_by_hand(vit, images, layer=1, window=2, positions="center", attention=True):
    """As above, for InternVL."""
    grid = images.shape[-2] // 4, images.shape[-1] // 4
    tokens = vit.embeddings(images)
    states = [tokens]
    for index, block in enumerate(vit.encoder.layer):
        tokens = block(tokens)
        if index == layer:

            def attend(x, present, block=block):
                return block.lambda_1 * block.attention(block.layernorm_before(x[None]))[0][0]

            def mlp(z, block=block):
                return block.lambda_2 * mlp_mean(block.layernorm_after, block.mlp, z)

            tokens = merge_batch(tokens, grid, 1, window, attend if attention else None, mlp)
        states.append(tokens)
    return states


def rms_norm(self, hidden_states):
    """The RMSNorm of transformers, but in float64 for float64, where it computes in float32."""
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * x.to(hidden_states.dtype)


modeling_internvl.InternVLVisionRMSNorm.forward = rms_norm
modeling_aimv2.Aimv2RMSNorm.forward = rms_norm
CLIP = {"intermediate_size": 48}
DINOV2 = {"mlp_ratio": 2}
STAGES = {"out_indices": [1, 2, 4]}
RESIZED = {"interpolate_pos_encoding": True}
CASES = {
    "SigLIP": HfCase(
        "SiglipVisionModel", "SiglipVisionConfig", CLIP, clip_by_hand, resizes=RESIZED
    ),
    "SigLIP, no head": HfCase(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**CLIP, "vision_use_head": False, "hidden_act": "gelu"},
        clip_by_hand,
        resizes=RESIZED,
    ),
    "Idefics 2": HfCase("Idefics2VisionTransformer", "Idefics2VisionConfig", CLIP, idefics_by_hand),
    "SmolVLM": HfCase("SmolVLMVisionTransformer", "SmolVLMVisionConfig", CLIP, idefics_by_hand),
    "CLIP": HfCase("CLIPVisionModel", "CLIPVisionConfig", CLIP, clip_by_hand, resizes=RESIZED),
    "CLIP with projection": HfCase(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**CLIP, "projection_dim": 8},
        clip_by_hand,
        "vision_model",
        resizes=RESIZED,
    ),
    "AIMv2": HfCase(
        "Aimv2VisionModel", "Aimv2VisionConfig", {**CLIP, "is_native": True}, aimv2_by_hand
    ),
    "BLIP-2": HfCase("Blip2VisionModel", "Blip2VisionConfig", CLIP, clip_by_hand, resizes=RESIZED),
    "Janus": HfCase(
        "JanusVisionModel",
        "JanusVisionConfig",
        {"mlp_ratio": 1.5, "attention_bias": False},
        clip_by_hand,
        resizes=RESIZED,
    ),
    "InternVL": HfCase(
        "InternVLVisionModel",
        "InternVLVisionConfig",
        {**CLIP, "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
        internvl_by_hand,
        layers="encoder.layer",
    ),
    "InternVL, no norms": HfCase(  # of queries and keys, nor positions
        "InternVLVisionModel",
        "InternVLVisionConfig",
        {**CLIP, "attention_bias": True, "use_absolute_position_embeddings": False},
        internvl_by_hand,
        layers="encoder.layer",
    ),
    "DINOv2": HfCase("Dinov2Model", "Dinov2Config", DINOV2, dino_by_hand, layers="encoder.layer"),
    "DINOv2, gated": HfCase(
        "Dinov2Model",
        "Dinov2Config",
        {**DINOV2, "use_swiglu_ffn": True, "qkv_bias": False},
        dino_by_hand,
        layers="encoder.layer",
    ),
    "DINOv2 with registers": HfCase(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        DINOV2,
        dino_by_hand,
        layers="encoder.layer",
    ),
    "DINOv2 classifier": HfCase(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        DINOV2,
        dino_by_hand,
        "dinov2",
        "encoder.layer",
    ),
    "DINOv3": HfCase(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**CLIP, "num_register_tokens": 4},
        dino_by_hand,
        layers="model.layer",
    ),
    "DINOv3, gated": HfCase(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**CLIP, "use_gated_mlp": True, "hidden_act": "silu"},
        dino_by_hand,
        layers="model.layer",
    ),
}
BACKBONES = {
    "DINOv2": HfCase(
        "Dinov2Backbone", "Dinov2Config", {**DINOV2, **STAGES}, dino_by_hand, "", "encoder.layer"
    ),
    "DINOv2 with registers": HfCase(
        "Dinov2WithRegistersBackbone",
        "Dinov2WithRegistersConfig",
        {**DINOV2, **STAGES},
        dino_by_hand,
        "",
        "encoder.layer",
    ),
    "DINOv3": HfCase(
        "DINOv3ViTBackbone",
        "DINOv3ViTConfig",
        {**CLIP, **STAGES, "num_register_tokens": 2, "return_class_token": True},
        dino_by_hand,
        "",
        "model.layer",
    ),
}


def all_cases():
    """Return the cases as the battery of families takes them."""
    return {f"transformers: {name}": case.as_case() for name, case in CASES.items()}
