# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of transformers, each with its processor, made by hand."""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import tokenizers
import torch
import transformers

WORDS = ("what", "is", "in", "this", "picture", "?", "a", "small", "red", "square")
SPECIAL = {
    "image_token": "<image>",
    "image_boundary_token": "<fake_token_around_image>",
    "video_token": "<video>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "img_line_break_token": "<line>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "vision_start_token": "<img>",
    "vision_end_token": "</img>",
}
MORE = (
    "<START>",
    "<END>",
    "<PATCH>",
    "TILE",
    "TILE_GLOBAL",
    "TILE_1",
    "TILE_2",
    "TILE_3",
    "TILE_4",
)
MORE += ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<tile_line>")
MORE += tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
LAYER = 1
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer():
    special = list(dict.fromkeys([*SPECIAL.values(), *MORE]))
    words = ["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS]
    words = {word: index for index, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL,
    )
    made.add_tokens(special, special_tokens=True)
    return made


def picture(height=40, width=70):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return transformers.image_utils.PIL.Image.fromarray(pixels)


def siglip(size, patch):
    return transformers.SiglipVisionConfig(
        **TOWER, image_size=size, patch_size=patch, vision_use_head=False
    )


def clip(size, patch):
    return transformers.CLIPVisionConfig(**TOWER, image_size=size, patch_size=patch)


def llama():
    return transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer()))


def image_id(token="<image>"):
    return tokenizer().convert_tokens_to_ids(token)


@dataclasses.dataclass(frozen=True)
class Vlm:
    """A model and its processor.

    Attributes:
        name: Of the type, as in docs/vlms.md.
        make: Returns both.
        tokens: How many placeholders the processor writes for the picture, without a compressor and
            with one.
        image: What stands for an image in a text.
        token: What the processor makes of it, once for every token.
    """

    name: str
    make: Callable
    tokens: tuple[int, int]
    image: str = "<image>"
    token: str = "<image>"

    def inputs(self, processor, **options):
        text = f"what is in {self.image} this picture ?"
        inputs = processor(text=text, images=picture(), return_tensors="pt", **options)
        inputs.pop("labels", None)
        return inputs

    def num_image_tokens(self, inputs):
        return (inputs["input_ids"] == image_id(self.token)).sum().item()


def llava(kind, vision, size, strategy="full", **options):
    def make():
        config = getattr(transformers, f"{kind}Config")(
            vision_config=copy.deepcopy(vision),
            text_config=llama(),
            image_token_index=image_id(),
            **options,
            vision_feature_select_strategy=strategy,
        )
        processor = transformers.LlavaProcessor(
            transformers.SiglipImageProcessor(size={"height": size, "width": size}),
            tokenizer(),
            patch_size=vision.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(strategy == "default"),
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def llava_next(kind, vision, size):
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]

    def make():
        options = {} if kind == "LlavaNext" else {"video_token_index": image_id("<video>")}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=copy.deepcopy(vision),
            text_config=llama(),
            image_token_index=image_id(),
            image_grid_pinpoints=pinpoints,
            **options,
        )
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=pinpoints,
        )
        parts = {"image_processor": images, "tokenizer": tokenizer()}
        if kind == "LlavaNextVideo":
            parts["video_processor"] = transformers.LlavaNextVideoVideoProcessor(
                size={"height": size, "width": size}, do_center_crop=False, do_sample_frames=False
            )
        processor = getattr(transformers, f"{kind}Processor")(
            **parts,
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def onevision(vision, size):
    pinpoints = [[size, size], [size, 2 * size], [2 * size, 2 * size]]

    def make():
        config = transformers.LlavaOnevisionConfig(
            vision_config=copy.deepcopy(vision),
            text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer())),
            image_token_index=image_id(),
            video_token_index=image_id("<video>"),
            image_grid_pinpoints=pinpoints,
        )
        processor = transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(
                size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
            ),
            tokenizer(),
            transformers.LlavaOnevisionVideoProcessor(
                size={"height": size, "width": size}, do_sample_frames=False
            ),
            num_image_tokens=(size // vision.patch_size) ** 2,
            vision_feature_select_strategy="full",
        )
        return transformers.LlavaOnevisionForConditionalGeneration(config), processor

    return make


def video_llava(vision, size):
    def make():
        config = transformers.VideoLlavaConfig(
            vision_config=copy.deepcopy(vision),
            text_config=llama(),
            image_token_index=image_id(),
            video_token_index=image_id("<video>"),
        )
        sizes = {
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        }
        processor = transformers.VideoLlavaProcessor(
            transformers.VideoLlavaImageProcessor(**sizes),
            transformers.VideoLlavaVideoProcessor(**sizes, do_sample_frames=False),
            tokenizer(),
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
        )
        return transformers.VideoLlavaForConditionalGeneration(config), processor

    return make


def paligemma(vision, size):
    def make():
        text = transformers.GemmaConfig(**TEXT, vocab_size=len(tokenizer()))
        config = transformers.PaliGemmaConfig(
            vision_config=copy.deepcopy(vision),
            text_config=text,
            image_token_index=image_id(),
            projection_dim=TEXT["hidden_size"],
        )
        images = transformers.SiglipImageProcessor(size={"height": size, "width": size})
        images.image_seq_length = (size // vision.patch_size) ** 2
        processor = transformers.PaliGemmaProcessor(images, tokenizer())
        model = transformers.PaliGemmaForConditionalGeneration(config)
        model.resize_token_embeddings(len(processor.tokenizer))
        return model, processor

    return make


def gemma3(vision, size, tokens):
    def make():
        text = transformers.Gemma3TextConfig(**TEXT, vocab_size=len(tokenizer()))
        config = transformers.Gemma3Config(
            vision_config=copy.deepcopy(vision),
            text_config=text,
            image_token_index=image_id(),
            boi_token_index=image_id("<boi>"),
            eoi_token_index=image_id("<eoi>"),
            mm_tokens_per_image=tokens,
        )
        processor = transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size={"height": size, "width": size}),
            tokenizer(),
            image_seq_length=tokens,
        )
        return transformers.Gemma3ForConditionalGeneration(config), processor

    return make


def cohere2(vision, size):
    def make():
        text = transformers.Cohere2Config(**TEXT, vocab_size=len(tokenizer()))
        config = transformers.Cohere2VisionConfig(
            vision_config=copy.deepcopy(vision), text_config=text, alignment_intermediate_size=64
        )
        config.image_token_id = image_id()
        images = transformers.Cohere2VisionImageProcessor(
            size={"height": size, "width": size}, max_patches=4
        )
        images.patch_size = -(-size // vision.patch_size // 2)
        processor = transformers.Cohere2VisionProcessor(images, tokenizer())
        return transformers.Cohere2VisionForConditionalGeneration(config), processor

    return make


def aya(vision, size):
    def make():
        text = transformers.Cohere2Config(**TEXT, vocab_size=len(tokenizer()))
        config = transformers.AyaVisionConfig(
            vision_config=copy.deepcopy(vision),
            text_config=text,
            adapter_layer_norm_eps=1e-6,
            image_token_index=image_id("<PATCH>"),
        )
        processor = transformers.AyaVisionProcessor(
            transformers.GotOcr2ImageProcessor(
                size={"height": size, "width": size}, crop_to_patches=True, max_patches=4
            ),
            tokenizer(),
            patch_size=vision.patch_size,
            img_size=size,
            downsample_factor=2,
            start_of_img_token="<START>",
            end_of_img_token="<END>",
            img_patch_token="<PATCH>",
            img_line_break_token="<line>",
        )
        return transformers.AyaVisionForConditionalGeneration(config), processor

    return make


def deepseek(vision, size):
    def make():
        config = transformers.DeepseekVLConfig(
            vision_config=copy.deepcopy(vision), text_config=llama(), image_token_id=image_id()
        )
        processor = transformers.DeepseekVLProcessor(
            transformers.DeepseekVLImageProcessor(size={"height": size, "width": size}),
            tokenizer(),
            num_image_tokens=(size // vision.patch_size) ** 2,
        )
        return transformers.DeepseekVLForConditionalGeneration(config), processor

    return make


def pixtral(kind, **options):
    """Images of any size; ``options`` are the config's."""

    def make():
        config = getattr(transformers, f"{kind}Config")(
            vision_config=transformers.PixtralVisionConfig(**TOWER, image_size=64, patch_size=4),
            text_config={**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer())},
            **options,
        )
        config.image_token_id = image_id()
        images = transformers.PixtralImageProcessor(size={"longest_edge": 64})
        made = transformers.PixtralProcessor(
            images,
            tokenizer(),
            patch_size=4,
            spatial_merge_size=options.get("spatial_merge_size", 1),
        )
        made.image_token, made.image_token_id = "<image>", image_id()
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), made

    return make


def idefics2():
    text = {**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer())}
    config = transformers.Idefics2Config(
        vision_config={**TOWER, "image_size": 32, "patch_size": 4},
        text_config=text,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        image_token_id=image_id(),
    )
    images = transformers.Idefics2ImageProcessor(
        size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(images, tokenizer(), image_seq_len=3)
    return transformers.Idefics2ForConditionalGeneration(config), processor


def idefics3(kind, **parts):
    """Idefics 3 and SmolVLM: a connector that merges 2 x 2 of 6 x 6 patches."""

    def make():
        config = getattr(transformers, f"{kind}Config")(
            vision_config={**TOWER, "image_size": 24, "patch_size": 4},
            text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer())},
            scale_factor=2,
            image_token_id=image_id(),
        )
        images = getattr(transformers, f"{kind}ImageProcessor")(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
        )
        processor = getattr(transformers, f"{kind}Processor")(
            images, tokenizer(), image_seq_len=9, **{name: part() for name, part in parts.items()}
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def internvl():
    text = {**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer())}
    vision = {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=image_id(), image_seq_length=9
    )
    size = {"height": 24, "width": 24}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer(),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=9,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def qwen(kind, vision, video="Qwen2VL"):
    """Qwen2-VL and later: 2 x 2 patches become a token behind the tower."""

    def make():
        ids = {name: image_id(token) for name, token in IDS.items()}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        text_config = {**TEXT, "vocab_size": len(tokenizer()), "rope_parameters": rope}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision, text_config=text_config, **ids
        )
        size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        patches = {"patch_size": 4, "size": size}
        processor = getattr(transformers, f"{kind}Processor")(
            transformers.Qwen2VLImageProcessor(**patches),
            tokenizer(),
            getattr(transformers, f"{video}VideoProcessor")(**patches, do_sample_frames=False),
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def glm(kind):
    """GLM-4.1V and 4.6V, likewise."""

    def make():
        ids = {
            "image_token_id": image_id(),
            "image_start_token_id": image_id("<img>"),
            "image_end_token_id": image_id("</img>"),
            "video_token_id": image_id("<video>"),
            "video_start_token_id": image_id("<boi>"),
            "video_end_token_id": image_id("<eoi>"),
        }
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        text = {**TEXT, "vocab_size": len(tokenizer()), "rope_parameters": rope}
        vision = {
            **QWEN_VISION,
            **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
            "image_size": 16,
        }
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision, text_config={**text, "model_type": "glm4v_text"}, **ids
        )
        size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        processor = getattr(transformers, f"{kind}Processor")(
            getattr(transformers, f"{kind}ImageProcessor")(patch_size=4, size=size),
            tokenizer(),
            getattr(transformers, f"{kind}VideoProcessor")(patch_size=4, size=size),
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def kimi():
    """MoonViT in front of a DeepSeek-V3."""
    text = {
        "model_type": "deepseek_v3",
        "vocab_size": len(tokenizer()),
        **{name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        **{name: TEXT[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    vision = {**TOWER, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}
    config = transformers.Kimi_K25Config(
        text_config=text,
        vision_config={**vision, "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
        projection_hidden_size=32,
        **{name: image_id(token) for name, token in IDS.items()},
    )
    size = {"max_height": 64, "max_width": 64}
    processor = transformers.Kimi_K25Processor(
        transformers.Kimi_K25ImageProcessor(patch_size=4, size=size),
        tokenizer(),
        transformers.Kimi_K25VideoProcessor(patch_size=4, size=size),
    )
    return transformers.Kimi_K25ForConditionalGeneration(config), processor


IDS = {
    "image_token_id": "<image>",
    "video_token_id": "<video>",
    "vision_start_token_id": "<img>",
    "vision_end_token_id": "</img>",
}
QWEN_VISION = {"depth": 4, "patch_size": 4, "spatial_merge_size": 2, "num_heads": 2}


def pi0():
    """A robot's policy around PaliGemma: model, processor, and a function that makes inputs."""
    text = {**TEXT, "model_type": "gemma", "vocab_size": 1300}
    vision = {**TOWER, "image_size": 30, "patch_size": 6, "vision_use_head": False}
    config = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": {**vision, "model_type": "siglip_vision_model"},
            "projection_dim": TEXT["hidden_size"],
            "image_token_id": image_id(),
        },
        dit_config=text,
        chunk_size=4,
    )
    images = transformers.SiglipImageProcessor(size={"height": 30, "width": 30})
    images.image_seq_length = 25
    moments = {
        f"{of}_{name}": [1.0] * 32 for of in ("state", "actions") for name in ("mean", "std")
    }
    processor = transformers.PI0Processor(images, tokenizer(), **moments, chunk_size=4)

    def inputs():
        robot = {"state": torch.zeros(1, 32), "actions": torch.zeros(1, 4, 32)}
        options = {"padding": False, "max_length": None}
        return processor(images=picture(), text="what is this", **robot, **options)

    return transformers.PI0ForConditionalGeneration(config), processor, inputs


def t5gemma2():
    """An encoder and a decoder, with Gemma 3's projector: likewise."""
    text = {**TEXT, "vocab_size": len(tokenizer()), "sliding_window": 64}
    config = transformers.T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": siglip(32, 4).to_dict(),
            "mm_tokens_per_image": 16,
        },
        decoder=text,
        image_token_index=image_id(),
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(images, tokenizer(), image_seq_length=16)

    def inputs():
        made = processor(images=picture(), text="what is <boi> this", return_tensors="pt")
        made.pop("token_type_ids")
        return {**made, "labels": made["input_ids"]}

    return transformers.T5Gemma2ForConditionalGeneration(config), processor, inputs


# LLaVA-NeXT cuts the picture of 40 x 70 px into 2 x 2 tiles. Of their 10 x 10 patches, the padding
# takes 4 rows, so that there are 6 * (10 + 1) tokens with the line breaks, and 5 * 5 of the whole
# picture; of 6 x 6 merged tokens, it takes 2 rows: 4 * (6 + 1) and 3 * 3. Command A and Aya cut it
# into 5 and 3 tiles with 3 * 3 tokens each behind the connector, or 2 * 2; InternVL cuts as Aya.
# Idefics 3 and SmolVLM cut it into 4 with a picture of the whole. Around Pixtral, it has
# 40 x 64 px for 5 * 8 tokens that are merged once, of 48 x 64 px 3 * 4 that are merged twice. The
# Qwens round it to 40 x 72 px, 5 * 9 tokens of 2 * 2 patches, or to 32 x 64 px, 2 * 4 of 4 * 4; the
# GLMs to 32 x 56 px, 4 * 7 tokens, or likewise.
VLMS = [
    Vlm("llava", llava("Llava", siglip(30, 6), 30), (25, 9)),
    Vlm("llava", llava("Llava", clip(24, 6), 24, "default"), (16, 4)),
    Vlm(
        "vipllava",
        llava("VipLlava", clip(24, 6), 24, "default", vision_feature_layer=[-2, -1]),
        (16, 4),
    ),
    Vlm("llava_next", llava_next("LlavaNext", clip(30, 6), 30), (91, 37)),
    Vlm("llava_next_video", llava_next("LlavaNextVideo", clip(24, 6), 24), (52, 14)),
    Vlm("llava_onevision", onevision(siglip(30, 6), 30), (91, 37)),
    Vlm("video_llava", video_llava(clip(24, 6), 24), (16, 4)),
    Vlm("paligemma", paligemma(siglip(30, 6), 30), (25, 9)),
    Vlm("gemma3", gemma3(siglip(32, 4), 32, 16), (16, 16), "<boi>"),
    Vlm("cohere2_vision", cohere2(siglip(24, 4), 24), (45, 20)),
    Vlm("aya_vision", aya(siglip(24, 4), 24), (27, 12), token="<PATCH>"),
    Vlm("internvl", internvl, (27, 12)),
    Vlm("idefics2", idefics2, (3, 3)),
    Vlm("idefics3", idefics3("Idefics3"), (45, 20)),
    Vlm(
        "smolvlm", idefics3("SmolVLM", video_processor=transformers.SmolVLMVideoProcessor), (45, 20)
    ),
    Vlm("mistral3", pixtral("Mistral3", spatial_merge_size=2), (40, 12)),
    Vlm(
        "llava",
        pixtral("Llava", vision_feature_layer=-1, vision_feature_select_strategy="full"),
        (144, 40),
    ),
    Vlm(
        "qwen2_vl",
        qwen("Qwen2VL", {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
        (45, 8),
    ),
    Vlm(
        "qwen2_5_vl",
        qwen(
            "Qwen2_5_VL",
            {
                **QWEN_VISION,
                **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
                **{"fullatt_block_indexes": [3], "window_size": 32},
            },
        ),
        (45, 8),
    ),
    Vlm(
        "qwen3_vl",
        qwen(
            "Qwen3VL",
            {
                **QWEN_VISION,
                **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
                **{"deepstack_visual_indexes": [2, 3], "num_position_embeddings": 64},
            },
            video="Qwen3VL",
        ),
        (45, 8),
    ),
    Vlm("glm4v", glm("Glm4v"), (28, 8)),
    Vlm("glm46v", glm("Glm46V"), (28, 8)),
    Vlm("kimi_k25", kimi, (45, 15)),
    Vlm("deepseek_vl", deepseek(siglip(30, 6), 30), (25, 9)),
]
