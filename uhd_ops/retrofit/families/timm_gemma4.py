# SPDX-License-Identifier: Apache-2.0
"""timm's ``Gemma4VitEncoder`` with a compressor, and ``Gemma4VitClassifier`` around it.

Both take images and padded batches of patches. The grids of the latter are read from
``patch_coord``; where it is on a CUDA device, the host waits for that, once in a forward pass of
the encoder and once more in one of the classifier. torch.compile leaves such a pass to eager mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.models import gemma4_vit
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from torch import nn

from uhd_ops.nn import modules
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import Limits
from uhd_ops.nn.positions import Rotary
from uhd_ops.retrofit.adapter import (
    CoarseBlock,
    CompressedBlock,
    CompressedPaddedModel,
    CompressedWrapper,
    Family,
    TokenLayout,
    encoder_or_self,
    require_methods,
)
from uhd_ops.retrofit.families import timm_vision_transformer as parts
from uhd_ops.retrofit.packed import Grid, PackedModel, Sides, Tables
from uhd_ops.retrofit.padded_layout import PaddedLayout

_LIMITS = ("input_min", "input_max", "output_min", "output_max")


def read(block: nn.Module) -> BlockSpec:
    """Return the parts of a ``Gemma4Block``: a norm in front of each branch and one behind it."""
    modules.require_own_forward(block, "block")
    drop_path = parts.drop_path(block.drop_path, "block.drop_path")
    attention = _attention(
        block.attn,
        norm=parts.norm(block.norm1, "block.norm1"),
        post=parts.norm(block.norm2, "block.norm2"),
        drop_path=drop_path,
    )
    mlp = _mlp(
        block.mlp,
        norm=parts.norm(block.norm3, "block.norm3"),
        post=parts.norm(block.norm4, "block.norm4"),
        drop_path=drop_path,
    )
    dim = block.attn.q_proj.linear.in_features
    return BlockSpec(dim, (attention,), (mlp,), block=block)


def _attention(module: nn.Module, **branch: object) -> AttentionSpec:
    name = "block.attn"
    modules.require_exactly(module, name, (gemma4_vit.Gemma4Attention,))
    modules.require_own_forward(module, name)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _linear(getattr(module, projection), f"{name}.{projection}")
    return AttentionSpec(
        module.num_heads,
        (module.q_proj, module.k_proj, module.v_proj),
        module.o_proj,
        module.head_dim,
        num_kv_heads=module.num_kv_heads,
        scale=1.0,
        q_norm=parts.norm(module.q_norm, f"{name}.q_norm"),
        k_norm=parts.norm(module.k_norm, f"{name}.k_norm"),
        v_norm=parts.norm(module.v_norm, f"{name}.v_norm"),
        rotate_half=2,  # the first half of a head turns with the column, the second with the row
        attention_dropout=modules.dropout(module.attn_drop, f"{name}.attn_drop"),
        proj_dropout=modules.dropout(module.proj_drop, f"{name}.proj_drop"),
        **branch,
    )


def _mlp(module: nn.Module, **branch: object) -> MlpSpec:
    name = "block.mlp"
    modules.require_exactly(module, name, (gemma4_vit.Gemma4GatedMlp,))
    modules.require_own_forward(module, name)
    limits = {
        "fc1": _limits(module.up_proj),
        "gate": _limits(module.gate_proj),
        "fc2": _limits(module.down_proj),
    }
    return MlpSpec(
        _linear(module.up_proj, f"{name}.up_proj"),
        _linear(module.down_proj, f"{name}.down_proj"),
        gate=_linear(module.gate_proj, f"{name}.gate_proj"),
        activation=parts.activation(module.act, f"{name}.act"),
        limits={part: found for part, found in limits.items() if found is not None},
        output_dropout=modules.dropout(module.drop, f"{name}.drop"),
        **branch,
    )


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """Return the layer inside a ``Gemma4ClippableLinear``."""
    modules.require_exactly(module, name, (gemma4_vit.Gemma4ClippableLinear,))
    modules.require_plain(module, name, _LIMITS)
    return module.linear


def _limits(module: nn.Module) -> Limits | None:
    """Return the limits of a ``Gemma4ClippableLinear``, or None where it has none."""
    if not all(limit in module._buffers for limit in _LIMITS):
        return None
    return Limits(*(module._buffers[limit] for limit in _LIMITS), enabled=module.use_clipped)


# What the compressor relies on; a subclass that changes one of these is not understood.
_METHODS = ("forward", "forward_features", "forward_intermediates")
Layout = TokenLayout | PaddedLayout
Images = torch.Tensor | dict[str, torch.Tensor]


class CompressedGemma4Block(CompressedBlock):
    """Block ``layer`` of the encoder."""

    def _positions(
        self,
        layout: Layout,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> Rotary:
        tables = (rope_sin.unsqueeze(-2), rope_cos.unsqueeze(-2))
        if isinstance(layout, PaddedLayout):
            tables = (layout.pack(table) for table in tables)
        return Rotary(*tables)


class CoarseGemma4Block(CoarseBlock):
    """A block after it."""

    def forward(
        self,
        x: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block on merged tokens with their positions and, if padded, their mask."""
        layout = self._layout_of(x)
        merged = layout.merged(self.window)
        merged.check(x)

        def derive(cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return layout.merge_table(rope_sin, cos, self.window, self.positions)

        rope_sin, rope_cos = self._derived(x, rope_cos, derive)
        attn_mask = merged.key_mask(x.dtype) if isinstance(merged, PaddedLayout) else None
        return super().forward(x, rope_cos, rope_sin, attn_mask)


class CompressedGemma4VitEncoder(CompressedPaddedModel):
    """An encoder with a compressor."""

    adapted: ClassVar[Mapping[str, str]] = CompressedPaddedModel.adapted | {"forward": "_forward"}

    def _forward(self, layout: Layout, method: Any, arguments: dict[str, Any]) -> torch.Tensor:
        """Do what ``forward`` does; what is pooled are the merged tokens, by their own grid."""
        self._check_pooler(layout)
        features = functools.partial(self.body_class.forward_features, self)
        tokens = self._run(layout, features, arguments)
        layout = self._behind(layout)
        if self.global_pool == "soft":
            return self._pool(tokens, layout)
        if self.global_pool != "avg":
            return tokens
        if isinstance(layout, TokenLayout):
            return tokens.mean(1)
        kept = tokens.masked_fill(~layout.valid[..., None], 0.0)
        return kept.sum(1) / layout.valid.sum(1, keepdim=True).clamp(min=1)

    def _intermediates(self, layout: Layout, method: Any, arguments: dict[str, Any]) -> Any:
        result = super()._intermediates(layout, method, arguments)
        if isinstance(result, dict) and isinstance(layout, TokenLayout):
            merged, valid = self._behind(layout), result["patch_valid"]
            places = valid.shape[0], merged.height * merged.width
            result["merged_patch_valid"] = valid.new_ones(places)
        return result

    def set_clamp_enabled(self, enabled: bool = True) -> None:
        """As in the model's class, the compressor's clamps included."""
        super().set_clamp_enabled(enabled)
        for module in self.modules():
            if isinstance(module, Limits):
                module.enabled = enabled

    def _layout(
        self,
        x: Images,
        patch_coord: torch.Tensor | None = None,
        patch_valid: torch.Tensor | None = None,
        **options: Any,
    ) -> Layout:
        if isinstance(x, dict):
            patch_coord = x.get("patch_coord", patch_coord)
            patch_valid = x.get("patch_valid", patch_valid)
            x = x["patches"]
        if patch_coord is None:
            if x.dim() != 4:
                raise ValueError(
                    f"x must be images (B, C, H, W) or come with patch_coord, got shape "
                    f"{tuple(x.shape)}"
                )
            height, width = self.patch_size
            return TokenLayout(x.shape[-2] // height, x.shape[-1] // width, 0)
        if patch_valid is None:
            patch_valid = (patch_coord != -1).any(-1)
        return PaddedLayout.of(patch_coord, patch_valid, 0, x.device)

    def _check_pooler(self, layout: Layout) -> None:
        """Refuse grids that the pooler cannot divide into cells."""
        kernel, behind = self.pooling_kernel_size, self._behind(layout)
        if self.global_pool != "soft":
            return
        for height, width in behind.grids if isinstance(behind, PaddedLayout) else [behind[:2]]:
            if height % kernel or width % kernel:
                raise ValueError(
                    f"the merged grid must have sides divisible by {kernel} for the soft pooler, "
                    f"got {height} x {width}: use images with sides of a multiple of "
                    f'{self._windows()[-1]} * {kernel} patches, or global_pool "avg"'
                )

    def _pool(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Run the pooler on merged tokens with their positions; it takes (column, row)."""
        padding = None
        if isinstance(layout, PaddedLayout):
            positions = layout.unpack(layout.grids.coordinates(tokens.device)).long()
            padding = None if layout.full else ~layout.valid
        else:
            positions, _ = self.patch_embed._default_patch_coord(
                tokens.shape[0], *layout[:2], tokens.device
            )
        pooled, _ = self.pooler(tokens, positions.flip(-1), padding)
        return pooled if self.std_bias is None else (pooled - self.std_bias) * self.std_scale


class CompressedGemma4VitClassifier(CompressedWrapper):
    """The classifier, whose head pools the tokens that the encoder returns."""

    adapted: ClassVar[Mapping[str, str]] = {"forward": "_forward"}
    takes_padded = True

    def _layout(self, **arguments: Any) -> Layout:
        # In front of the encoder: what is read from a device waits for all that is queued there.
        return self.encoder._behind(self.encoder._layout(**arguments))

    def _forward(self, layout: Layout, method: Any, arguments: dict[str, Any]) -> torch.Tensor:
        features = self.forward_features(**arguments)
        return self.forward_head(features, patch_valid=getattr(layout, "valid", None))


def check(vit: nn.Module, config: CompressorConfig) -> None:
    """Refuse a model that is not understood."""
    if isinstance(vit, Gemma4VitClassifier):
        require_methods(vit, Gemma4VitClassifier, (*_METHODS, "forward_head"))
    require_methods(encoder_or_self(vit), Gemma4VitEncoder, (*_METHODS, "_encode"))


class PackedGemma4(PackedModel):
    """A Gemma4VitEncoder on packed views."""

    position_names = "patch_embed.position_embedding_table", "rotary_emb"

    methods = ("forward_features", "_encode")

    @classmethod
    def patch_size(cls, vit: Gemma4VitEncoder) -> tuple[int, int]:
        """Height and width of a patch, in px."""
        return tuple(vit.patch_embed.patch_size)

    @classmethod
    def channels(cls, vit: Gemma4VitEncoder) -> int:
        """Channels of a pixel."""
        return vit.patch_embed.input_proj.in_features // math.prod(vit.patch_embed.patch_size)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """A linear layer on pixels that it scales from 0..1 to -1..1."""
        return self.vit.patch_embed.input_proj((2 * (pixels - 0.5)).flatten(1))

    def absolute(self, grid: Grid) -> torch.Tensor:
        """The sum of one row of each table: the first is for columns."""
        cols, rows = self.vit.patch_embed.position_embedding_table
        return (rows[: grid[0], None] + cols[: grid[1]]).flatten(0, 1)

    def rope(self, grid: Grid) -> Tables:
        """Made from the coordinates, (column, row)."""
        weight, embed = self.vit.patch_embed.input_proj.weight, self.vit.patch_embed
        coordinates, _ = embed._default_patch_coord(1, *grid, weight.device)
        cos, sin = self.vit.rotary_emb(weight, coordinates.flip(-1))
        return sin[0], cos[0]

    def finish(
        self, prefix: torch.Tensor, patches: torch.Tensor, sides: Sides
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing follows the last block."""
        return prefix, patches


FAMILY = Family(
    CompressedGemma4VitEncoder,
    CompressedGemma4Block,
    CoarseGemma4Block,
    check,
    transformer=encoder_or_self,
    wrapper=CompressedGemma4VitClassifier,
    packed=PackedGemma4,
)
