# SPDX-License-Identifier: Apache-2.0
"""Models whose tower takes images of one size, whole or cut into tiles."""

import copy

import transformers

from vlms.case import TEXT, TOWER, image_id, llama, tokenizer


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


def janus():
    """Images of 30 px, 5 x 5 patches; what it generates images with is as small as can be."""
    vq = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32}
    small = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "image_token_embed_dim": 8}
    vision = {**TOWER, "image_size": 30, "patch_size": 6, "num_image_tokens": 25, "mlp_ratio": 1.5}
    config = transformers.JanusConfig(
        text_config=llama(),
        vision_config={**vision, "projection_dim": TEXT["hidden_size"], "depth": 2},
        vq_config={**vq, **small, "projection_dim": TEXT["hidden_size"]},
        image_token_id=image_id(),
    )
    processor = transformers.JanusProcessor(
        transformers.JanusImageProcessor(size={"height": 30, "width": 30}),
        tokenizer(),
        num_image_tokens=25,
    )
    return transformers.JanusForConditionalGeneration(config), processor
