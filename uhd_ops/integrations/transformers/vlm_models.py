# SPDX-License-Identifier: Apache-2.0
"""Where vision-language models of transformers count the tokens of their vision tower.

A compressor leaves ``ceil(n / window)`` tokens on each side of a grid. What a model or its
processor derives from the sizes of image and patch has to follow. Each class of models has an entry
that names its towers, its processor's counts, and the methods in which it counts itself. Those
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
from uhd_ops.ops.reorder_tokens import reorder_tokens
from uhd_ops.retrofit.relative_positions import StandIn

Counts = dict[str, int]
Counting = Callable[[Any, CompressorConfig | None], Counts]


@dataclass(frozen=True)
class Entry:
    """What a class of models needs beside the compressor in its tower.

    Attributes:
        counts: Given the model's config and what compresses its towers, if anything: what
            attributes of the processor must say, by dotted name. Raises a ValueError where no
            number does.
        towers: Attributes of the model that hold its vision towers.
        parts: Mixins by the names of the parts that they change; ``""`` is the model itself.
        check: Called as ``counts``: raises a ValueError where the model itself cannot count.
    """

    counts: Counting
    towers: tuple[str, ...] = ("vision_tower",)
    parts: Mapping[str, type[Mixed]] = field(default_factory=dict)
    check: Counting | None = None


def grid_side(config: Any, compression: CompressorConfig | None = None) -> int:
    """Tokens on a side after all merges, of the images that a vision config is made for."""
    sizes = [config.image_size, config.patch_size]
    (height, rows), (width, cols) = zip(
        *((size, size) if isinstance(size, int) else tuple(size) for size in sizes), strict=True
    )
    if height // rows != width // cols:
        raise ValueError(
            "the vision config must be for square images, which the model counts by one side, got "
            f"image_size={config.image_size} and patch_size={config.patch_size}"
        )
    return merged_side(height // rows, compression)


def compression_of(tower: nn.Module) -> CompressorConfig | None:
    """What compresses a tower, if anything."""
    return getattr(tower, "compression", None)


def merged_side(side: Any, compression: CompressorConfig | None) -> Any:
    """Tokens on a side after all merges; of an int or a tensor."""
    for _ in compression.layers if compression else ():
        side = -(-side // compression.window)
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

    def _on_merged_grid(self) -> Any:
        """This model, with a config whose patches are the merged tokens."""
        config = self.config
        vision = config.vision_config
        side = grid_side(vision, compression_of(self.vision_tower))
        patch_size = patch_size_for(vision.image_size, side)
        vision = StandIn(vision, patch_size=patch_size)
        return StandIn(self, config=StandIn(config, vision_config=vision))


class TiledImages(_LooksUpPatchSize):
    """LLaVA-NeXT and those after it, which put the tiles of an image together."""

    def pack_image_features(
        self,
        image_features: Any,
        image_sizes: Any,
        vision_feature_select_strategy: Any,
        image_newline: Any = None,
    ) -> Any:
        """Put the tiles together, each on the grid of merged tokens."""
        return self.body_class.pack_image_features(
            self._on_merged_grid(),
            image_features,
            image_sizes,
            vision_feature_select_strategy,
            image_newline,
        )


class TiledImagesAndVideos(_LooksUpPatchSize):
    """LLaVA-OneVision, which also halves the grids of a video."""

    def pack_image_features(
        self,
        image_features: Any,
        image_sizes: Any,
        image_newline: Any = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> Any:
        """Put the tiles together, each on the grid of merged tokens."""
        return self.body_class.pack_image_features(
            self._on_merged_grid(), image_features, image_sizes, image_newline, vision_aspect_ratio
        )

    def apply_pooling(self, image_features: torch.Tensor) -> torch.Tensor:
        """Halve the grids of merged tokens."""
        return self.body_class.apply_pooling(self._on_merged_grid(), image_features)


# ---- connectors that merge tokens themselves -----------------------------------------------------


def _padded(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """Pad square maps ``(B, s, s, C)`` by zeros until ``factor`` divides their sides."""
    missing = -maps.shape[1] % factor
    return functional.pad(maps, (0, 0, 0, missing, 0, missing))


def _padded_square(x: torch.Tensor, factor: int) -> torch.Tensor:
    """As ``_padded``, for tokens ``(B, s * s, C)``."""
    side = math.isqrt(x.shape[1])
    return _padded(x.unflatten(1, (side, side)), factor).flatten(1, 2)


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
        """Merge tokens ``(B, s, s, C)``, also where ``s * scale_factor`` is not a whole number."""
        padded = _padded(vision_features, round(1 / scale_factor))
        return self.body_class.pixel_shuffle(self, padded, scale_factor)


class PoolsToFixedNumber(Mixed):
    """The projector of Gemma 3: it averages down to as many tokens as its config says."""

    def forward(self, vision_outputs: torch.Tensor) -> torch.Tensor:
        """Average the windows of merged tokens, which are smaller by as much."""
        side = math.isqrt(vision_outputs.shape[1])
        pool = nn.AvgPool2d(side // self.tokens_per_side)
        merged = StandIn(self, patches_per_image=side, avg_pool=pool)
        return self.body_class.forward(merged, vision_outputs)


# ---- towers that pack images of any size ---------------------------------------------------------


class _TowerForSizes(StandIn):
    """A tower that gets the sizes of the images, whatever its caller passes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{**kwargs, "image_sizes": self.image_sizes})


class PacksImages(Mixed):
    """Mistral 3 around Pixtral, which splits the tower's tokens by the sizes of the images."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: Any,
        vision_feature_layer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Split and merge the tokens as those of images whose patches are the merged tokens."""
        merged, stand_in = self._for_sizes(image_sizes)
        return self.body_class.get_image_features(
            stand_in, pixel_values, merged, vision_feature_layer=vision_feature_layer, **kwargs
        )

    def _for_sizes(self, sizes: Any) -> tuple[Any, StandIn]:
        """Sizes of images with as many patches as there are merged tokens; the model for them."""
        tower = self.vision_tower
        patch, compression = self.config.vision_config.patch_size, compression_of(tower)
        if isinstance(sizes, torch.Tensor):
            merged = merged_side(sizes // patch, compression) * patch
        else:
            merged = [[merged_side(int(n) // patch, compression) * patch for n in s] for s in sizes]
        return merged, StandIn(self, vision_tower=_TowerForSizes(tower, image_sizes=sizes))


class MayPackImages(PacksImages):
    """LLaVA, which has sizes of images only around Pixtral."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: Any = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Likewise."""
        model = self
        if image_sizes is not None:
            image_sizes, model = self._for_sizes(image_sizes)
        return self.body_class.get_image_features(
            model,
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **kwargs,
        )


class ResamplesImages(Mixed):
    """Idefics 2, whose resampler gets the mask of the tower's patches."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Let the resampler have the mask of the merged tokens."""
        masks: list[torch.Tensor] = []

        def tower(patch_attention_mask: torch.Tensor, **options: Any) -> Any:
            mask, compression = patch_attention_mask, compression_of(self.vision_model)
            for _ in compression.layers if compression else ():
                mask = functional.max_pool2d(mask.float(), compression.window, ceil_mode=True)
            masks.append(mask.bool().flatten(1))
            return self.vision_model(patch_attention_mask=patch_attention_mask, **options)

        def connector(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.connector(tokens, attention_mask=masks.pop())

        stand_in = StandIn(self, vision_model=tower, connector=connector)
        return self.body_class.get_image_features(
            stand_in, pixel_values, pixel_attention_mask, **kwargs
        )


# ---- towers that get their patches in blocks -----------------------------------------------------


class _TowerForBlocks(StandIn):
    """A tower that gets patches in larger blocks than those that it knows."""

    def __call__(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        shapes = grid_thw.tolist()
        grids = [(height, width) for frames, height, width in shapes for _ in range(frames)]
        sides = (self.module.spatial_merge_size,), (self.spatial_merge_size,)
        pixel_values = reorder_tokens(pixel_values, grids, sides[0], order_in=sides[1])
        return super().__call__(pixel_values, grid_thw=grid_thw, **kwargs)


class GetsBlocks(Mixed):
    """Qwen2-VL to 3-VL and GLM-4V, whose processors order the patches by the squares they merge.

    With a compressor, these are squares of merged squares: the processor has them in its
    ``merge_size``, by which it also rounds sizes and counts.
    """

    def _for_blocks(self) -> StandIn:
        """The model, with the size of the squares that become one token of the language model."""
        config, vision = self.config, self.config.vision_config
        size = _merge_size(config, compression_of(self.visual))
        vision = StandIn(vision, spatial_merge_size=size)
        visual = _TowerForBlocks(self.visual, spatial_merge_size=size)
        return StandIn(self, config=StandIn(config, vision_config=vision), visual=visual)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Split the tokens by the images, of which fewer are left."""
        model = self._for_blocks()
        return self.body_class.get_image_features(model, pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Likewise."""
        features = self.body_class.get_video_features
        return features(self._for_blocks(), pixel_values_videos, video_grid_thw, **kwargs)

    def get_rope_index(self, *args: Any, **kwargs: Any) -> Any:
        """Positions of the tokens that are left."""
        return self.body_class.get_rope_index(self._for_blocks(), *args, **kwargs)


class GetsRows(Mixed):
    """Kimi K2.5, whose processor rounds sizes by ``merge_size``, but orders patches row by row."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Split the tokens by the images, of which fewer are left."""
        size = _merge_size(self.config, compression_of(self.vision_tower))
        tower = StandIn(self.vision_tower, merge_kernel_size=(size, size))
        model = StandIn(self, vision_tower=tower)
        return self.body_class.get_image_features(model, pixel_values, image_grid_thw, **kwargs)


# ---- counts of the processors --------------------------------------------------------------------


def _side(config: Any, compression: CompressorConfig | None, factor: int = 1) -> int:
    """Tokens on a side after a connector that merges squares of a side of ``factor``."""
    return -(-grid_side(config.vision_config, compression) // factor)


def _factor(compression: CompressorConfig | None) -> int:
    """Patches on a side of what a merged token stands for."""
    return compression.window ** len(compression.layers) if compression else 1


def _patch_size(config: Any, compression: CompressorConfig | None) -> Counts:
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return _pixtral(config, compression)
    return {"patch_size": patch_size_for(vision.image_size, _side(config, compression))}


def _pixtral(config: Any, compression: CompressorConfig | None) -> Counts:
    """The processor makes images that whole squares of merged tokens divide."""
    return {"patch_size": config.vision_config.patch_size * _factor(compression)}


def _merge_size(config: Any, compression: CompressorConfig | None) -> int:
    """Patches on a side of what a token of the language model stands for."""
    vision = config.vision_config
    own = vision.merge_kernel_size[0] if vision.model_type == "kimi_k25_vision" else None
    return (own or vision.spatial_merge_size) * _factor(compression)


def _merge_sizes(config: Any, compression: CompressorConfig | None) -> Counts:
    size = _merge_size(config, compression)
    return {"image_processor.merge_size": size, "video_processor.merge_size": size}


def _number(name: str, factor: Callable[[Any], int] = lambda config: 1) -> Counting:
    """The number of tokens, under a name."""
    return lambda config, compression: {name: _side(config, compression, factor(config)) ** 2}


def _aya(config: Any, compression: CompressorConfig | None) -> Counts:
    side = _side(config, compression, config.downsample_factor)
    return {"patch_size": patch_size_for(config.vision_config.image_size, side)}


def _cohere2(config: Any, compression: CompressorConfig | None) -> Counts:
    # What the processor calls a patch size is the number of tokens on a side of a tile.
    side = _side(config, compression, config.downsample_factor)
    return {"patch_size": side, "image_processor.patch_size": side}


def _paligemma(config: Any, compression: CompressorConfig | None) -> Counts:
    number = _side(config, compression) ** 2
    return {"image_seq_length": number, "image_processor.image_seq_length": number}


def _gemma3(config: Any, compression: CompressorConfig | None) -> Counts:
    side, wanted = _side(config, compression), math.isqrt(config.mm_tokens_per_image)
    if side % wanted:
        raise ValueError(
            f"the tower must leave a multiple of {wanted} tokens on a side, which the model "
            f"averages down to mm_tokens_per_image={config.mm_tokens_per_image}, got {side}"
        )
    return {"image_seq_length": config.mm_tokens_per_image}


_GEMMA3 = Entry(_gemma3, parts={"multi_modal_projector": PoolsToFixedNumber}, check=_gemma3)
_LLAVA_NEXT = Entry(_patch_size, parts={"": TiledImages}, check=_patch_size)
_IDEFICS3 = Entry(
    _number("image_seq_len", lambda config: config.scale_factor),
    towers=("vision_model",),
    parts={"connector": ShufflesByArgument},
)
_INTERNVL = Entry(
    _number("image_seq_length", lambda config: round(1 / config.downsample_ratio)),
    parts={"": ShufflesMaps},
)
_MISTRAL3 = Entry(_pixtral, parts={"": PacksImages})
_QWEN = Entry(_merge_sizes, towers=("visual",), parts={"": GetsBlocks})
ENTRIES: dict[str, Entry] = {
    "AyaVisionModel": Entry(_aya, parts={"multi_modal_projector": ShufflesByAttribute}),
    "Cohere2VisionModel": Entry(_cohere2, parts={"multi_modal_projector": ShufflesByAttribute}),
    "DeepseekVLModel": Entry(_number("num_image_tokens"), towers=("vision_model",)),
    "Gemma3Model": _GEMMA3,
    "Glm46VModel": _QWEN,
    "Glm4vModel": _QWEN,
    "Glm4vMoeModel": _QWEN,
    "Idefics2Model": Entry(
        lambda config, compression: {"image_seq_len": config.perceiver_config.resampler_n_latents},
        towers=("vision_model",),
        parts={"": ResamplesImages},
    ),
    "Idefics3Model": _IDEFICS3,
    "InternVLModel": _INTERNVL,
    "JanusModel": Entry(_number("num_image_tokens"), towers=("vision_model",)),
    "Kimi_K25Model": Entry(_merge_sizes, parts={"": GetsRows}),
    "LlavaModel": Entry(_patch_size, parts={"": MayPackImages}),
    "LlavaNextModel": _LLAVA_NEXT,
    "LlavaNextVideoModel": _LLAVA_NEXT,
    "LlavaOnevisionModel": Entry(
        _number("num_image_tokens"), parts={"": TiledImagesAndVideos}, check=_patch_size
    ),
    "Mistral3Model": _MISTRAL3,
    "MistralLarge4Model": _MISTRAL3,
    "PaliGemmaModel": Entry(_paligemma),
    "Qwen2VLModel": _QWEN,
    "Qwen2_5_VLModel": _QWEN,
    "Qwen3VLModel": _QWEN,
    "Qwen3VLMoeModel": _QWEN,
    "Qwen3_5Model": _QWEN,
    "Qwen3_5MoeModel": _QWEN,
    "SmolVLMModel": _IDEFICS3,
    "T5Gemma2Encoder": _GEMMA3,
    "VideoLlavaModel": Entry(_patch_size, towers=("image_tower", "video_tower")),
    "VipLlavaModel": Entry(_patch_size),
}


def entry_of(module: nn.Module) -> Entry | None:
    """The entry for the class of a model, by the first class of transformers that it extends."""
    for cls in body_class(module).__mro__:
        if cls.__module__.startswith("transformers.models."):
            return ENTRIES.get(cls.__name__)
    return None
