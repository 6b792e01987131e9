# SPDX-License-Identifier: Apache-2.0
"""Models whose tower takes images of any sizes in one sequence."""

import transformers

from vlms.case import TEXT, TOWER, image_id, tokenizer


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


SIZE = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
QWEN_VISION = {"depth": 4, "patch_size": 4, "spatial_merge_size": 2, "num_heads": 2}
QWEN3_VISION = {**QWEN_VISION, **SIZES, "num_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


# Attention without a softmax in front of one with it.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
GLM_EXPERTS = {
    "model_type": "glm4v_moe_text",
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "head_dim": 32,  # half of it rotates
}


def text_with_sections(**options):
    """A language model whose rotary embeddings have sections for frames, rows and columns."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return {**TEXT, "vocab_size": len(tokenizer()), "rope_parameters": rope, **options}


def qwen(kind, vision, like="", video="Qwen2VL", **text):
    """Qwen2-VL and later: 2 x 2 patches become a token behind the tower.

    Args:
        kind: Of the model.
        vision: Options of its tower.
        like: Kind of its processor, if another one.
        video: Kind of its video processor.
        **text: Options of its language model.
    """

    def make():
        ids = {name: image_id(token) for name, token in IDS.items()}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision, text_config=text_with_sections(**text), **ids
        )
        patches = {"patch_size": 4, "size": SIZE}
        processor = getattr(transformers, f"{like or kind}Processor")(
            transformers.Qwen2VLImageProcessor(**patches),
            tokenizer(),
            getattr(transformers, f"{video}VideoProcessor")(**patches, do_sample_frames=False),
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor

    return make


def glm(kind, like="", **options):
    """GLM-4.1V and later, likewise."""

    def make():
        ids = {
            "image_token_id": image_id(),
            "image_start_token_id": image_id("<img>"),
            "image_end_token_id": image_id("</img>"),
            "video_token_id": image_id("<video>"),
            "video_start_token_id": image_id("<boi>"),
            "video_end_token_id": image_id("<eoi>"),
        }
        config = getattr(transformers, f"{kind}Config")(
            vision_config={**QWEN_VISION, **SIZES, "image_size": 16},
            text_config=text_with_sections(**{"model_type": "glm4v_text", **options}),
            **ids,
        )
        processor = getattr(transformers, f"{like or kind}Processor")(
            getattr(transformers, f"{like or kind}ImageProcessor")(patch_size=4, size=SIZE),
            tokenizer(),
            getattr(transformers, f"{like or kind}VideoProcessor")(patch_size=4, size=SIZE),
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
