# SPDX-License-Identifier: Apache-2.0
"""Progressive compression: several merges inside one vision transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from uhd_ops.retrofit.config import ProgressiveCompressionConfig
from uhd_ops.retrofit.insertion import insert, insert_again, remove
from uhd_ops.retrofit.registry import family_of, refuse_other


def insert_progressive_compression(
    vit: nn.Module,
    layers: Sequence[int] = (4, 18),
    *,
    pool: str = "adaptive",
    hidden_dim: int | None = None,
    window: int = 2,
    positions: str = "center",
) -> nn.Module:
    """Merge each window of patch tokens into one token after several blocks, in place.

    After each of the ``layers`` a :class:`uhd_ops.nn.WindowTokenCompressor` divides the tokens by
    ``window²``: N, N/4, N/16, ... Grids are carried through all merges, with ragged windows at odd
    sides; so are positions, and a merged token of the second merge has the position of all the
    tokens that it came from. Class and register tokens never enter a window. The pooling starts as
    the mean of a window, and trains.

    In all other respects the model is what :func:`uhd_ops.insert_early_compressor` leaves: every
    parameter keeps its name, and the compressors' own are ``blocks.<index>.compressor.*``.

    Args:
        vit: A model of timm that :func:`uhd_ops.insert_early_compressor` takes.
        layers: Numbers of blocks in front of each merge, ascending. These are counts, as in the
            name of the released "4-18" encoder, where ``layer`` of insert_early_compressor is the
            0-based index of a block: ``layers=(7,)`` merges where ``layer=6`` does. ``(4, 18, 27)``
            are the three stages of 4, 14 and 9 blocks.
        pool: ``"adaptive"``, ``"mean"`` or ``"unshuffle"``; see WindowTokenCompressor.
        hidden_dim: Hidden channels of the pooling's MLP, or None for its default.
        window: Side of a window, in tokens.
        positions: As for insert_early_compressor: ``"center"`` keeps physical distances,
            ``"reindex"`` counts merged tokens anew, as the released encoder does.

    Returns:
        ``vit`` itself. Where it was compressed with the same options already, nothing is done.

    Raises:
        NotImplementedError: The class of the model, or a part of one of its blocks, is not
            supported.
        TypeError: An argument has the wrong type.
        ValueError: An option is out of range, or ``vit`` holds a compressor with other options. In
            every case of an error, the model is as it was.

    Source:
        LLaVA-UHD v3, progressive visual compression.

    Example:
        >>> import torch
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2)
        >>> vit = insert_progressive_compression(vit, layers=(1, 2))
        >>> vit.forward_features(torch.randn(1, 3, 64, 64)).shape  # class token and 2 x 2 patches
        torch.Size([1, 5, 32])
    """
    family = family_of(vit, library="timm")
    config = ProgressiveCompressionConfig(layers, pool, hidden_dim, window, positions)
    present = getattr(family.transformer(vit), "early_compressor", None)
    refuse_other(present, config)
    return (insert_again if present == config else insert)(vit, config, family)


def remove_progressive_compression(vit: nn.Module) -> nn.Module:
    """Take all merges out again, in place; their weights are lost.

    Args:
        vit: A model that :func:`insert_progressive_compression` returned.

    Returns:
        ``vit`` itself, with the class, attributes and parameters that it had before.

    Raises:
        NotImplementedError: The class of the model is not supported.
        TypeError: ``vit`` is no module.
        ValueError: The model holds no progressive compression.
    """
    family = family_of(vit)
    config = getattr(family.transformer(vit), "early_compressor", None)
    if not isinstance(config, ProgressiveCompressionConfig):
        raise ValueError("vit holds no progressive compression, so there is nothing to remove")
    return remove(vit, family)
