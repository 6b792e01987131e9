# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models of transformers, each with its processor, made by hand."""

import transformers

from vlms import packed, square
from vlms.case import Vlm, clip, siglip

# LLaVA-NeXT cuts the picture of 40 x 70 px into 2 x 2 tiles. Of their 10 x 10 patches, the padding
# takes 4 rows, so that there are 6 * (10 + 1) tokens with the line breaks, and 5 * 5 of the whole
# picture; of 6 x 6 merged tokens, it takes 2 rows: 4 * (6 + 1) and 3 * 3. Command A and Aya cut it
# into 5 and 3 tiles with 3 * 3 tokens each behind the connector, or 2 * 2; InternVL cuts as Aya.
# Idefics 3 and SmolVLM cut it into 4 with a picture of the whole. Around Pixtral, it has
# 40 x 64 px for 5 * 8 tokens that are merged once, of 48 x 64 px 3 * 4 that are merged twice. The
# Qwens round it to 40 x 72 px, 5 * 9 tokens of 2 * 2 patches, or to 32 x 64 px, 2 * 4 of 4 * 4; the
# GLMs to 32 x 56 px, 4 * 7 tokens, or likewise.
DEEPSTACK = {**packed.QWEN3_VISION, "deepstack_visual_indexes": [2, 3]}
VLMS = [
    Vlm("llava", square.llava("Llava", siglip(30, 6), 30), (25, 9)),
    Vlm("llava", square.llava("Llava", clip(24, 6), 24, "default"), (16, 4)),
    Vlm(
        "vipllava",
        square.llava("VipLlava", clip(24, 6), 24, "default", vision_feature_layer=[-2, -1]),
        (16, 4),
    ),
    Vlm("llava_next", square.llava_next("LlavaNext", clip(30, 6), 30), (91, 37)),
    Vlm("llava_next_video", square.llava_next("LlavaNextVideo", clip(24, 6), 24), (52, 14)),
    Vlm("llava_onevision", square.onevision(siglip(30, 6), 30), (91, 37)),
    Vlm("video_llava", square.video_llava(clip(24, 6), 24), (16, 4)),
    Vlm("paligemma", square.paligemma(siglip(30, 6), 30), (25, 9)),
    Vlm("gemma3", square.gemma3(siglip(32, 4), 32, 16), (16, 16), "<boi>"),
    Vlm("cohere2_vision", square.cohere2(siglip(24, 4), 24), (45, 20)),
    Vlm("aya_vision", square.aya(siglip(24, 4), 24), (27, 12), token="<PATCH>"),
    Vlm("internvl", square.internvl, (27, 12)),
    Vlm("janus", square.janus, (25, 9)),
    Vlm("idefics2", square.idefics2, (3, 3)),
    Vlm("idefics3", square.idefics3("Idefics3"), (45, 20)),
    Vlm(
        "smolvlm",
        square.idefics3("SmolVLM", video_processor=transformers.SmolVLMVideoProcessor),
        (45, 20),
    ),
    Vlm("mistral3", packed.pixtral("Mistral3", spatial_merge_size=2), (40, 12)),
    Vlm(
        "llava",
        packed.pixtral("Llava", vision_feature_layer=-1, vision_feature_select_strategy="full"),
        (144, 40),
    ),
    Vlm(
        "qwen2_vl",
        packed.qwen(
            "Qwen2VL", {**packed.QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        ),
        (45, 8),
    ),
    Vlm(
        "qwen2_5_vl",
        packed.qwen(
            "Qwen2_5_VL",
            {
                **packed.QWEN_VISION,
                **packed.SIZES,
                **{"fullatt_block_indexes": [3], "window_size": 32},
            },
        ),
        (45, 8),
    ),
    Vlm("qwen3_vl", packed.qwen("Qwen3VL", DEEPSTACK, video="Qwen3VL"), (45, 8)),
    Vlm(
        "qwen3_vl_moe",
        packed.qwen("Qwen3VLMoe", DEEPSTACK, "Qwen3VL", "Qwen3VL", **packed.EXPERTS),
        (45, 8),
    ),
    Vlm("glm4v_moe", packed.glm("Glm4vMoe", "Glm4v", **packed.GLM_EXPERTS), (28, 8)),
    Vlm("glm4v", packed.glm("Glm4v"), (28, 8)),
    Vlm("glm46v", packed.glm("Glm46V"), (28, 8)),
    Vlm("kimi_k25", packed.kimi, (45, 15)),
    Vlm("deepseek_vl", square.deepseek(siglip(30, 6), 30), (25, 9)),
]
# AutoProcessor gives this one a tokenizer of its own, whatever was saved.
QWEN3_5 = Vlm(
    "qwen3_5",
    packed.qwen("Qwen3_5", packed.QWEN3_VISION, "Qwen3VL", "Qwen3VL", **packed.LINEAR),
    (45, 8),
)
