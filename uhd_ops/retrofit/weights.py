# SPDX-License-Identifier: Apache-2.0
"""Weights of a compressor: initialised again, loaded with those of its model, trained in stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from uhd_ops._checks import check_int
from uhd_ops.nn.modules import Model
from uhd_ops.retrofit.adapter import CompressedBlock
from uhd_ops.retrofit.registry import family_of, read_in


def freeze_for_stage(vit: Model, stage: Literal[1, 2]) -> Model:
    """Choose what trains by ``requires_grad``, in place: what was inserted, or everything.

    Stage 1 trains the compressors and nothing else of ``vit``, so that what is new adapts to the
    trained model before it can disturb it. Stage 2 trains everything. Only floating-point
    parameters are touched. What stands outside ``vit``, such as the connector and the language
    model, is the caller's to freeze, and so is a head of ``vit`` that should train in stage 1:
    ``vit.head.requires_grad_(True)``. Gradients that are there already stay: call
    ``optimizer.zero_grad()``, or a parameter frozen now still takes a step with its old gradient.

    Args:
        vit: A model with a compressor, or a module that contains one.
        stage: 1 or 2.

    Returns:
        ``vit`` itself.

    Raises:
        TypeError: ``vit`` is no module, or ``stage`` no int.
        ValueError: ``stage`` is not 1 or 2, or no compressor was inserted into ``vit``. In every
            case of an error, nothing is changed.

    Source:
        Training in stages, as LLaVA-UHD v4 does; this division is ours, not the paper's recipe.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = freeze_for_stage(uhd_ops.insert_early_compressor(vit, layer=0), 1)
        >>> {name.split(".")[2] for name, p in vit.named_parameters() if p.requires_grad}
        {'compressor'}
    """
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a torch.nn.Module, got {type(vit).__name__}")
    if check_int(stage, "stage") not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage}")
    blocks = [module for module in vit.modules() if isinstance(module, CompressedBlock)]
    if not blocks:
        raise ValueError(
            f"vit must hold a compressor, got a {type(vit).__name__} without one; call "
            "insert_early_compressor(vit) first"
        )
    inserted = {id(p) for block in blocks for p in block.compressor.parameters()}
    for parameter in vit.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(stage == 2 or id(parameter) in inserted)
    return vit


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
        TypeError: ``vit`` is no module, or ``state_dict`` no mapping.
        ValueError: ``vit`` holds no compressor, or the checkpoint does not have the names and
            shapes of the model; in every case of an error, the model is as it was.

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
    _read(vit)  # refuses what cannot be reused before anything is changed
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
