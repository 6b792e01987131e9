# SPDX-License-Identifier: Apache-2.0
"""Stage-wise training of a model with a compressor: what trains, and what is frozen."""

from __future__ import annotations

from torch import nn

from uhd_ops._checks import check_int
from uhd_ops.retrofit.blocks import CompressedBlock


def freeze_for_stage(vit: nn.Module, stage: int) -> nn.Module:
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
