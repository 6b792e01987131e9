# SPDX-License-Identifier: Apache-2.0
"""Models that hold one of the others and are more than that."""

import torch
import transformers

from vlms.case import TEXT, TOWER, image_id, picture, siglip, tokenizer


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
