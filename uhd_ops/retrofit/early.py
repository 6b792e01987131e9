# SPDX-License-Identifier: Apache-2.0
"""The early compressor: one merge inside a vision transformer."""

from __future__ import annotations

from torch import nn

from uhd_ops.retrofit.config import EarlyCompressorConfig
from uhd_ops.retrofit.insertion import insert, insert_again, remove
from uhd_ops.retrofit.registry import family_of, refuse_other


def insert_early_compressor(
    vit: nn.Module,
    layer: int = 6,
    *,
    attention: bool | str = True,
    mlp: str = "reuse",
    form: str = "dense",
    window: int = 2,
    positions: str = "center",
) -> nn.Module:
    """Merge each window of patch tokens into one token after block ``layer``, in place.

    The blocks behind ``layer`` then work on ``ceil(h / window) * ceil(w / window)`` tokens instead
    of ``h * w``. Class and register tokens pass the compressor unchanged and never enter a window.
    Every parameter keeps its name; the compressor's own are ``blocks.<layer>.compressor.*``, or
    ``encoder.layers.<layer>.compressor.*`` and the like in transformers, initialised from block
    ``layer`` as :meth:`uhd_ops.nn.EarlyCompressor.from_block` says.

    The model stays what it was for its users: ``forward``, ``forward_features``,
    ``forward_intermediates`` (whose maps from block ``layer`` on are coarse; ``feature_info`` says
    so), gradient checkpointing (not the reentrant kind), ``copy.deepcopy``, pickling and
    ``torch.compile`` work as before. In transformers, ``hidden_states``, ``attentions`` and feature
    maps behind ``layer`` are those of merged tokens; the options are kept in ``config``, and
    :func:`uhd_ops.integrations.transformers.from_pretrained` loads what ``save_pretrained`` wrote.
    Padded batches (NaFlex, SigLIP 2) are merged sample by sample; masks and ``patch_valid`` behind
    the compressor are those of the merged tokens, and the grids are read from the device once for
    each forward pass. Refused at run time are attention masks made for the full sequence, causal
    attention, and patch dropout in training.

    Args:
        vit: A plain vision transformer of timm: ``VisionTransformer`` (SigLIP, CLIP, DeiT, DINOv2,
            AIMv2, ViTamin and others built on it), ``Eva`` (EVA-02, DINOv3, Perception Encoder),
            ``Beit``, ``VisionTransformerRelPos``, ``VisionTransformerSAM``, ``NaFlexVit``,
            ``Cait``, and the encoders of Qwen 3, DeepSeek and Gemma 4. Or one of transformers: the
            vision models of SigLIP, SigLIP 2, CLIP, DINOv2 and DINOv3. docs/models.md has the list.
        layer: 0-based index of the block after whose body the compressor runs; the last block is
            allowed.
        attention: Whether tokens attend inside their window before they are merged, or which query
            attends to its window; as for :class:`uhd_ops.nn.EarlyCompressor`.
        mlp: ``"reuse"`` for the block's own MLP, ``"plain"`` or ``"none"``; likewise.
        form: Weight form of the reused MLP: ``"dense"`` as in the released checkpoints,
            ``"block"``, or ``"tied"``. They start as the same function. Other MLPs have one form.
        window: Side of a window, in tokens.
        positions: What position a merged token has in the blocks behind the compressor, where they
            have rotary embeddings or relative positions: ``"center"``, the centre of its window,
            which keeps all distances, or ``"reindex"``, its index on the merged grid, which divides
            them by ``window``. Models with absolute positions only take either.

    Returns:
        ``vit`` itself. Where it holds a compressor with the same options already, nothing is done.
        An optimiser made before does not know the compressor's parameters, which are new.

    Raises:
        NotImplementedError: The class of the model, a part of block ``layer``, or ``mlp`` is not
            supported.
        TypeError: An argument has the wrong type.
        ValueError: ``layer``, ``form`` or ``window`` is out of range, or ``vit`` holds a compressor
            with other options. In every case of an error, the model is as it was.

    Source:
        LLaVA-UHD v4, section 3.2.

    Example:
        >>> import torch
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = insert_early_compressor(vit, layer=0)
        >>> vit.forward_features(torch.randn(1, 3, 32, 32)).shape  # class token and 2 x 2 patches
        torch.Size([1, 5, 32])
    """
    family = family_of(vit)
    config = EarlyCompressorConfig(layer, attention, mlp, form, window, positions)
    present = getattr(family.transformer(vit), "early_compressor", None)
    refuse_other(present, config)
    return (insert_again if present == config else insert)(vit, config, family)


def remove_early_compressor(vit: nn.Module) -> nn.Module:
    """Take the compressor out again, in place; its weights are lost.

    Args:
        vit: A model that :func:`insert_early_compressor` returned.

    Returns:
        ``vit`` itself: class, attributes and parameters are those it had before the insertion,
        updated by whatever training happened since.

    Raises:
        NotImplementedError: The class of the model is not supported.
        TypeError: ``vit`` is no module.
        ValueError: The model holds no compressor.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> type(remove_early_compressor(insert_early_compressor(vit, layer=0))).__name__
        'VisionTransformer'
    """
    family = family_of(vit)
    present = getattr(family.transformer(vit), "early_compressor", None)
    if present is None:
        raise ValueError("vit holds no compressor, so there is nothing to remove")
    if not isinstance(present, EarlyCompressorConfig):
        raise ValueError(f"vit holds {present}; call {present.removed_by}(vit) to remove it")
    return remove(vit, family)
