# SPDX-License-Identifier: Apache-2.0
"""Where vision-language models of transformers count the tokens of their vision tower.

A compressor leaves ``ceil(n / window)`` tokens on each side of a grid. What a model or its
processor derives from the sizes of image and patch has to follow. Each class of models has an entry
that tells of its towers, its processor's counts, and the methods in which it counts itself. Those
methods are replaced by mixins without any state: they look at the tower, or at the tokens that they
get, and do what the original does where it holds no compressor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import Mixed, body_class
from uhd_ops.retrofit.relative_positions import StandIn

Counts = dict[str, int]


@dataclass(frozen=True)
class Entry:
    """What a class of models needs beside the compressor in its tower.

    Attributes:
        counts: Given the model's config and the tokens on a side of the tower's grid: what
            attributes of the processor must say, by dotted name.
        towers: Attributes of the model that hold its vision towers.
        parts: Mixins by the names of the parts that they change; ``""`` is the model itself.
        check: Raises a ValueError where so many tokens on a side do not fit the model.
    """

    counts: Callable[[Any, int], Counts]
    towers: tuple[str, ...] = ("vision_tower",)
    parts: Mapping[str, type[Mixed]] = field(default_factory=dict)
    check: Callable[[Any, int], None] = lambda config, side: None


def fine_side(config: Any) -> int:
    """Patches on a side of the image that a vision config is made for."""
    sizes = [config.image_size, config.patch_size]
    (height, rows), (width, cols) = zip(
        *((size, size) if isinstance(size, int) else tuple(size) for size in sizes), strict=True
    )
    if height // rows != width // cols:
        raise ValueError(
            "the vision config must tell of square images, which the model counts by one side, got "
            f"image_size={config.image_size} and patch_size={config.patch_size}"
        )
    return height // rows


def merged_side(side: int, compression: CompressorConfig | None) -> int:
    """Tokens on a side behind all merges."""
    for _ in compression.layers if compression else ():
        side = math.ceil(side / compression.window)
    return side


def patch_size_for(image_size: int, side: int) -> int:
    """The patch size by which ``image_size // patch_size`` gives ``side``.

    With 384 px and patches of 14 px, 27 tokens become 14, and 384 // 27 is 14.
    """
    patch_size = image_size // side
    if image_size // patch_size != side:
        raise ValueError(
            f"image_size must be a size in px that some patch size divides into {side} tokens on a "
            f"side, rounded down, because the processor counts so; got {image_size}"
        )
    return patch_size


# ---- models that look up the patch size ----------------------------------------------------------


class _LooksUpPatchSize(Mixed):
    """A model whose methods divide the image size of the tower's config by its patch size."""

    def _merged(self) -> Any:
        """This model, with a config whose patches are the merged tokens."""
        config = self.config
        vision = config.vision_config
        side = merged_side(fine_side(vision), getattr(self.vision_tower, "compression", None))
        patch_size = patch_size_for(vision.image_size, side)
        vision = StandIn(vision, patch_size=patch_size)
        return StandIn(self, config=StandIn(config, vision_config=vision))


class TiledImages(_LooksUpPatchSize):
    """LLaVA-NeXT and those after it, which put the tiles of an image together."""

    def pack_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Put the tiles together, each on the grid of merged tokens."""
        return self.body_class.pack_image_features(self._merged(), *args, **kwargs)


class TiledImagesAndVideos(TiledImages):
    """LLaVA-OneVision, which also halves the grids of a video."""

    def apply_pooling(self, *args: Any, **kwargs: Any) -> Any:
        """Halve the grids of merged tokens."""
        return self.body_class.apply_pooling(self._merged(), *args, **kwargs)


# ---- connectors that merge tokens themselves -----------------------------------------------------


def _padded_square(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Pad a square of tokens ``(B, s * s, C)`` by zeros until ``factor`` divides its side."""
    side = math.isqrt(x.shape[1])
    missing = -side % factor
    square = x.unflatten(1, (side, side))
    return functional.pad(square, (0, 0, 0, missing, 0, missing)).flatten(1, 2)


class ShufflesByArgument(Mixed):
    """The connector of Idefics 3 and SmolVLM."""

    def pixel_shuffle(self, x: torch.Tensor, scale_factor: int = 2) -> torch.Tensor:
        """Merge tokens ``(B, s * s, C)``, also where ``scale_factor`` does not divide ``s``."""
        return self.body_class.pixel_shuffle(self, _padded_square(x, scale_factor), scale_factor)


class ShufflesByAttribute(Mixed):
    """The connector of Command A Vision and Aya Vision."""

    def pixel_shuffle(self, image_features: torch.Tensor) -> torch.Tensor:
        """Merge tokens ``(B, s * s, C)``, also where the factor does not divide ``s``."""
        padded = _padded_square(image_features, self.downsample_factor)
        return self.body_class.pixel_shuffle(self, padded)


class ShufflesMaps(Mixed):
    """InternVL, which merges the tokens in the model itself."""

    def pixel_shuffle(self, vision_features: torch.Tensor, scale_factor: float = 0.5) -> Any:
        """Merge tokens ``(B, s, s, C)``, also where ``s * scale_factor`` is no whole number."""
        missing = -vision_features.shape[1] % round(1 / scale_factor)
        padded = functional.pad(vision_features, (0, 0, 0, missing, 0, missing))
        return self.body_class.pixel_shuffle(self, padded, scale_factor)


class PoolsToFixedNumber(Mixed):
    """The projector of Gemma 3: it averages down to as many tokens as its config says."""

    def forward(self, vision_outputs: torch.Tensor) -> torch.Tensor:
        """Average the windows of merged tokens, which are smaller by as much."""
        side = math.isqrt(vision_outputs.shape[1])
        pool = nn.AvgPool2d(side // self.tokens_per_side)
        merged = StandIn(self, patches_per_image=side, avg_pool=pool)
        return self.body_class.forward(merged, vision_outputs)


# ---- counts of the processors --------------------------------------------------------------------


def _patch_size(config: Any, side: int) -> Counts:
    return {"patch_size": patch_size_for(config.vision_config.image_size, side)}


def _number(name: str, factor: Callable[[Any], int] = lambda config: 1) -> Callable[..., Counts]:
    """The number of tokens, under a name, behind a connector that merges squares of a side."""
    return lambda config, side: {name: math.ceil(side / factor(config)) ** 2}


def _aya(config: Any, side: int) -> Counts:
    side = math.ceil(side / config.downsample_factor)
    return {"patch_size": patch_size_for(config.vision_config.image_size, side)}


def _cohere2(config: Any, side: int) -> Counts:
    # What the processor calls a patch size is the number of tokens on a side of a tile.
    side = math.ceil(side / config.downsample_factor)
    return {"patch_size": side, "image_processor.patch_size": side}


def _paligemma(config: Any, side: int) -> Counts:
    return {"image_seq_length": side**2, "image_processor.image_seq_length": side**2}


def _gemma3(config: Any, side: int) -> None:
    wanted = math.isqrt(config.mm_tokens_per_image)
    if side % wanted:
        raise ValueError(
            f"the tower must leave a multiple of {wanted} tokens on a side, which the model "
            f"averages down to mm_tokens_per_image={config.mm_tokens_per_image}, got {side}"
        )


ENTRIES: dict[str, Entry] = {
    "AyaVisionModel": Entry(_aya, parts={"multi_modal_projector": ShufflesByAttribute}),
    "Cohere2VisionModel": Entry(_cohere2, parts={"multi_modal_projector": ShufflesByAttribute}),
    "DeepseekVLModel": Entry(_number("num_image_tokens"), towers=("vision_model",)),
    "Gemma3Model": Entry(
        lambda config, side: {"image_seq_length": config.mm_tokens_per_image},
        parts={"multi_modal_projector": PoolsToFixedNumber},
        check=_gemma3,
    ),
    "Idefics3Model": Entry(
        _number("image_seq_len", lambda config: config.scale_factor),
        towers=("vision_model",),
        parts={"connector": ShufflesByArgument},
    ),
    "InternVLModel": Entry(
        _number("image_seq_length", lambda config: round(1 / config.downsample_ratio)),
        parts={"": ShufflesMaps},
    ),
    "LlavaModel": Entry(_patch_size),
    "LlavaNextModel": Entry(_patch_size, parts={"": TiledImages}),
    "LlavaNextVideoModel": Entry(_patch_size, parts={"": TiledImages}),
    "LlavaOnevisionModel": Entry(_number("num_image_tokens"), parts={"": TiledImagesAndVideos}),
    "PaliGemmaModel": Entry(_paligemma),
    "SmolVLMModel": Entry(
        _number("image_seq_len", lambda config: config.scale_factor),
        towers=("vision_model",),
        parts={"connector": ShufflesByArgument},
    ),
    "T5Gemma2Encoder": Entry(
        lambda config, side: {"image_seq_length": config.mm_tokens_per_image},
        parts={"multi_modal_projector": PoolsToFixedNumber},
        check=_gemma3,
    ),
    "VideoLlavaModel": Entry(_patch_size, towers=("image_tower", "video_tower")),
    "VipLlavaModel": Entry(_patch_size),
}


def entry_of(module: nn.Module) -> Entry | None:
    """The entry for the class of a model, by the first class of transformers that it extends."""
    for cls in body_class(module).__mro__:
        if cls.__module__.startswith("transformers.models."):
            return ENTRIES.get(cls.__name__)
    return None
