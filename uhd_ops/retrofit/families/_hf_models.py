# SPDX-License-Identifier: Apache-2.0
"""What vision models of Hugging Face transformers with a compressor share.

The classes keep their names (``prefix = ""``): transformers finds out by the printed name of a
model's class which outputs it records, and by the names of classes what ``config.json`` calls the
architecture and which modules no device map may split.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import can_return_tuple

from uhd_ops.nn import modules
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import is_mixed
from uhd_ops.retrofit.adapter import (
    CoarseBlock,
    Compressed,
    CompressedBlock,
    CompressedModel,
    CompressedWrapper,
    TokenLayout,
    require_methods,
)
from uhd_ops.retrofit.families import _hf_blocks as parts
from uhd_ops.retrofit.families._hf_checkpoints import OPTIONS
from uhd_ops.retrofit.packed import Grid, PackedModel
from uhd_ops.retrofit.padded_layout import PaddedLayout
from uhd_ops.retrofit.relative_positions import StandIn


class FromConfig(Compressed):
    """A model of transformers; a new one is what its config says, as if this class were its own."""

    prefix = ""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if is_mixed(type(self)):
            self.__class__ = self.body_class
            self.__init__(config, *args, **kwargs)
        else:
            super().__init__(config, *args, **kwargs)


class CompressedHfModel(FromConfig, CompressedModel):
    """A model of transformers, whose ``config`` may describe the compressor if it was loaded."""

    def _forget(self) -> None:
        super()._forget()
        vars(self.config).pop(OPTIONS, None)

    adapted: ClassVar[Mapping[str, str]] = {"forward": "_run"}

    def _layout(self, pixel_values: torch.Tensor, **options: Any) -> TokenLayout:
        height, width = pixel_values.shape[-2:]
        rows, columns = self._patch_embedding().stride
        return TokenLayout(height // rows, width // columns, self._num_prefix_tokens())

    def _patch_embedding(self) -> nn.Conv2d:
        """The convolution that makes the patches."""
        return self.embeddings.patch_embeddings.projection

    def _num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and the registers."""
        return 1 + getattr(self.config, "num_register_tokens", 0)


class CompressedBackbone(CompressedHfModel):
    """A backbone; its feature maps have the grids that they have.

    The original would reshape the merged tokens to the fine grid: a quarter of the channels each,
    without an error.

    Attributes:
        maps_have_prefix: Whether what is not reshaped begins with the prefix tokens.
    """

    maps_have_prefix = True

    adapted: ClassVar[Mapping[str, str]] = {"forward": "_feature_maps"}

    @classmethod
    def _adapt(cls, method: Callable[..., Any], caller: Callable[..., Any]) -> Callable[..., Any]:
        return can_return_tuple(super()._adapt(method, caller))

    def _feature_maps(self, layout: TokenLayout, method: Any, arguments: dict[str, Any]) -> Any:
        """Call the original ``forward`` for sequences, and make maps of them."""
        stand_in = StandIn(self, config=StandIn(self.config, reshape_hidden_states=False))
        forward = functools.partial(self.body_class.forward, stand_in)
        output = self._run(layout, forward, arguments | {"return_dict": True})
        if self.config.reshape_hidden_states:
            start = layout.prefix if self.maps_have_prefix else 0
            maps = output.feature_maps
            output.feature_maps = tuple(self._to_map(layout, y[:, start:]) for y in maps)
        return output


class HfWrapper(FromConfig, CompressedWrapper):
    """A model of transformers that puts a head on one that holds the compressor."""


class CompressedLayer(CompressedBlock):
    """Layer ``layer``."""

    prefix = ""


class CoarseLayer(CoarseBlock):
    """A module after the compressor."""

    prefix = ""


class CoarseMaskedLayer(CoarseLayer):
    """A layer after the compressor that is given a mask where images are padded."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in the layer's class, with the mask of the merged tokens."""
        merged = self._layout_of(hidden_states).merged(self.window)

        def derive(valid: torch.Tensor) -> torch.Tensor | None:
            return create_bidirectional_mask(self.self_attn.config, hidden_states, valid)

        padded = isinstance(merged, PaddedLayout) and not merged.full
        mask = self._derived(hidden_states, merged.valid, derive) if padded else None
        return super().forward(hidden_states, mask, **kwargs)


class PackedHfModel(PackedModel):
    """A model of transformers on packed views."""

    methods = ("forward",)

    @classmethod
    def patch_size(cls, vit: nn.Module) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        size = vit.config.patch_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @classmethod
    def channels(cls, vit: nn.Module) -> int:
        """Channels of a pixel."""
        return vit.config.num_channels

    def checkpoints(self, index: int) -> bool:
        """Whether the model runs a layer again in the backward pass."""
        layer = self.blocks[index]
        return layer.training and layer.gradient_checkpointing

    def _interpolated(self, prefix: int, grid: Grid, dim: int) -> torch.Tensor:
        """What ``interpolate_pos_encoding`` adds, which reads nothing but the sizes."""
        rows, cols = self.patch_size(self.vit)
        tokens = torch.empty((), device="meta").expand(1, prefix + grid[0] * grid[1], dim)
        embeddings = self.vit.embeddings
        return embeddings.interpolate_pos_encoding(tokens, grid[0] * rows, grid[1] * cols)[0]


def require_understood(
    vit: nn.Module,
    config: CompressorConfig,
    blocks_name: str,
    layer: str = "Layer",
    encoder: str = "Encoder",
) -> None:
    """Refuse a model whose methods, encoder or layers are not those of its class.

    Args:
        vit: The model.
        config: Options of the insertion.
        blocks_name: Where its layers are.
        layer: What the name of a layer's class ends with.
        encoder: What that of the module ends with which holds them.
    """
    cls = next(c for c in type(vit).__mro__ if c.__module__.startswith("transformers.models."))
    require_methods(vit, cls, ("forward",))
    family = re.sub(r"(Vision)?(Model|Backbone|Transformer)$", "", cls.__name__)
    encoder, layer = (
        parts.sibling(cls, f"{family}Vision{name}", f"{family}{name}") for name in (encoder, layer)
    )
    expected = {blocks_name.rpartition(".")[0]: encoder}
    for index in range(config.layers[0], len(vit.get_submodule(blocks_name))):
        expected[f"{blocks_name}.{index}"] = layer
    for name, part in expected.items():
        modules.require_exactly(vit.get_submodule(name), f"vit.{name}", (part,))
        modules.require_own_forward(vit.get_submodule(name), f"vit.{name}")
