# SPDX-License-Identifier: Apache-2.0
"""What tiny vision-language models share: a tokenizer, a picture, sizes."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tokenizers
import transformers
from PIL import Image

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
    return Image.fromarray(pixels)


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
