# SPDX-License-Identifier: Apache-2.0
"""Weights of a compressor: initialised again, loaded with those of its model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from uhd_ops.nn.modules import Model
from uhd_ops.retrofit.adapter import CompressedBlock
from uhd_ops.retrofit.registry import family_of, read_in


def load_plain_checkpoint(vit: Model, state_dict: Mapping[str, torch.Tensor]) -> Model:
    """Load a checkpoint of the model without a compressor, and make the compressor reuse it.

    ``load_state_dict(..., strict=False)`` would load the same weights, but leave the compressor
    with those that it reused when it was inserted.

    Args:
        vit: A model with a compressor; changed in place.
        state_dict: Tensors of the model as they are named without a compressor, all of them.

    Returns:
        ``vit`` itself, as if the checkpoint had been loaded before the insertion.

    Raises:
        NotImplementedError: The class of the model is not supported, or a block can no longer be
            reused (its layers were adapted or quantised, say).
        TypeError: ``vit`` is not a module, or ``state_dict`` not a mapping.
        ValueError: ``vit`` holds no compressor, or the checkpoint does not have the names and
            shapes of the model; after an error, the model is as it was.

    Example:
        >>> import uhd_ops
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> checkpoint = VisionTransformer(**options).state_dict()
        >>> vit = uhd_ops.insert_early_compressor(VisionTransformer(**options), layer=0)
        >>> vit = load_plain_checkpoint(vit, checkpoint)
        >>> reused = vit.blocks[0].compressor.attn.qkv.weight
        >>> torch.equal(reused, checkpoint["blocks.0.attn.qkv.weight"])
        True
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    blocks = compressed_blocks(vit)
    if not blocks:
        raise ValueError(f"vit must hold a compressor, got {type(vit).__name__} without one")
    inserted = {id(tensor) for block in blocks for tensor in _tensors(block.compressor)}
    own = {n: t for n, t in vit.state_dict(keep_vars=True).items() if id(t) not in inserted}
    wrong = [
        name
        for name in sorted(own.keys() | state_dict.keys())
        if name not in own or name not in state_dict or own[name].shape != state_dict[name].shape
    ]
    if wrong:
        name = wrong[0]
        expected, got = (
            tuple(tensors[name].shape) if name in tensors else None for tensors in (own, state_dict)
        )
        raise ValueError(
            f"state_dict must have the names and shapes of the model without its compressor, but "
            f"{len(wrong)} differ: {name} must have shape {expected}, got {got}"
        )
    reuse_again(vit)  # refuses what cannot be reused before anything is changed
    vit.load_state_dict(dict(state_dict), strict=False)
    return reuse_again(vit)


def reuse_again(vit: nn.Module) -> nn.Module:
    """Initialise all compressors in a model from their blocks, in place, as the insertion does."""
    for block, spec in _read(vit):
        block.compressor.reuse_(spec)
    return vit


def compressed_blocks(vit: nn.Module) -> list[CompressedBlock]:
    """The blocks of a model that hold a compressor."""
    family = family_of(vit)
    blocks = family.transformer(vit).get_submodule(family.model.blocks_name)
    return [block for block in blocks.modules() if isinstance(block, CompressedBlock)]


def _read(vit: nn.Module) -> list[tuple[CompressedBlock, object]]:
    family = family_of(vit)
    transformer = family.transformer(vit)
    return [(block, read_in(family, transformer, block)) for block in compressed_blocks(vit)]


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
