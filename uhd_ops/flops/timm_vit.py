# SPDX-License-Identifier: Apache-2.0
"""Read the sizes of a timm VisionTransformer, and of what was inserted into it."""

from __future__ import annotations

import dataclasses

from torch import nn

from uhd_ops.flops.config import ViTConfig
from uhd_ops.nn.early_compressor import CompressorConfig


def vit_config(vit: nn.Module) -> ViTConfig:
    """Read the sizes of a timm ``VisionTransformer``.

    Args:
        vit: The model, with or without a compressor.

    Returns:
        Its sizes.

    Raises:
        NotImplementedError: The model is no plain ViT with one block size, joint qkv projection and
            two-layer MLP.
    """
    name = type(vit).__name__
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(vit).__mro__}
    if "timm.models.vision_transformer.VisionTransformer" not in classes:
        raise NotImplementedError(f"vit must be a plain timm VisionTransformer, got {name}")
    try:
        projection = vit.patch_embed.proj.weight
        sizes = {_block_sizes(block) for block in vit.blocks}
    except AttributeError as error:
        raise NotImplementedError(
            f"vit must be a plain timm VisionTransformer, got {name}: {error}"
        ) from None
    if len(sizes) != 1:
        raise NotImplementedError(
            f"vit must have blocks of one size, got {name} with {len(sizes)} sizes"
        )
    matrices = [key for key, x in vit.patch_embed.named_parameters() if x.dim() > 1]
    square = projection.dim() == 4 and projection.shape[2] == projection.shape[3]
    if matrices != ["proj.weight"] or not square:
        raise NotImplementedError(
            f"vit must embed square patches with one convolution, got {name} with the weights "
            f"{matrices}, the last of shape {tuple(projection.shape)}"
        )
    dim, heads, mlp_hidden = sizes.pop()
    return ViTConfig(
        dim=dim,
        depth=len(vit.blocks),
        heads=heads,
        mlp_hidden=mlp_hidden,
        patch=projection.shape[-1],
        in_channels=projection.shape[1],
        prefix_tokens=vit.num_prefix_tokens,
    )


def compressor_config(vit: nn.Module) -> CompressorConfig | None:
    """Read what was inserted into a timm ``VisionTransformer``.

    Args:
        vit: The model.

    Returns:
        The options, with the layers that pruning left; None for a model without compressors.

    Raises:
        NotImplementedError: The model holds compressors of another origin.
    """
    found = tuple(layer for layer, block in enumerate(vit.blocks) if hasattr(block, "compressor"))
    if not found:
        return None
    config = getattr(vit, "compression", None)
    if config is None or not set(found) <= set(config.layers):
        raise NotImplementedError(
            "vit must hold what insert_early_compressor or insert_progressive_compression made, "
            f"got {type(vit).__name__} with compressors behind the blocks {list(found)}"
        )
    return dataclasses.replace(config, layers=found)


def _block_sizes(block: nn.Module) -> tuple[int, int, int]:
    """Width, heads and hidden width of a block that has the counted matrices and no others."""
    kind = type(block.attn).__qualname__
    if kind != "Attention":  # differential attention has the same matrices and costs more
        raise NotImplementedError(f"vit must have blocks with timm's Attention, got {kind}")
    dim, hidden = block.attn.qkv.in_features, block.mlp.fc1.out_features
    expected = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    matrices = {
        key: tuple(parameter.shape)
        for key, parameter in ((k.removesuffix(".weight"), p) for k, p in block.named_parameters())
        if parameter.dim() > 1 and not key.startswith("compressor.")
    }
    if matrices != expected:
        raise NotImplementedError(
            f"vit must have blocks with the matrices {expected}, got {type(block).__name__} "
            f"with {matrices}"
        )
    return dim, block.attn.num_heads, hidden
