# SPDX-License-Identifier: Apache-2.0
"""Insert the compressor into an existing vision transformer, and take it out again."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from uhd_ops.retrofit.config import EarlyCompressorConfig

__all__ = ["EarlyCompressorConfig", "insert_early_compressor", "remove_early_compressor"]

# One file per family; it is imported when a model of that class turns up, so that nothing is
# imported which the caller does not have. Subclasses belong to the first class that they extend.
_FAMILIES = {
    "timm.models.vision_transformer.VisionTransformer": "timm_vision_transformer",
}


def insert_early_compressor(
    vit: nn.Module,
    layer: int = 6,
    *,
    attention: bool = True,
    mlp: str = "reuse",
    form: str = "dense",
    window: int = 2,
) -> nn.Module:
    """Merge each window of patch tokens into one token after block ``layer``, in place.

    The blocks behind ``layer`` then work on ``ceil(h / window) * ceil(w / window)`` tokens instead
    of ``h * w``. Class and register tokens pass the compressor unchanged and never enter a window.
    Every parameter keeps its name; the compressor's own are ``blocks.<layer>.compressor.*``,
    initialised from block ``layer`` as :meth:`uhd_ops.nn.EarlyCompressor.from_block` says.

    The model stays what it was for its users: ``forward``, ``forward_features``,
    ``forward_intermediates`` (whose maps from block ``layer`` on are coarse; ``feature_info`` says
    so), gradient checkpointing (not the reentrant kind), ``copy.deepcopy``, pickling and
    ``torch.compile`` work as before. Refused at run time are attention masks, causal attention, and
    patch dropout in training.

    Args:
        vit: timm's ``VisionTransformer`` (SigLIP, CLIP, DeiT, DINOv2, AugReg and others built on
            it).
        layer: 0-based index of the block after whose body the compressor runs; the last block is
            allowed.
        attention: Whether tokens attend inside their window before they are merged.
        mlp: Where the MLP comes from; ``"reuse"``, the block's own, is what there is.
        form: Weight form of the MLP: ``"dense"`` as in the released checkpoints, ``"block"``, or
            ``"tied"``. They start as the same function.
        window: Side of a window, in tokens.

    Returns:
        ``vit`` itself. Where it holds a compressor with the same options already, nothing is done.

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
    family = _family_of(vit)
    config = EarlyCompressorConfig(layer, attention, mlp, form, window)
    present = getattr(vit, "early_compressor", None)
    if present == config:
        return vit
    if present is not None:
        raise ValueError(
            f"vit holds a compressor already, {present}; call remove_early_compressor(vit) before "
            f"inserting {config}"
        )
    return family.insert(vit, config)


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
    family = _family_of(vit)
    if getattr(vit, "early_compressor", None) is None:
        raise ValueError("vit holds no compressor, so there is nothing to remove")
    return family.remove(vit)


def _family_of(vit: nn.Module) -> ModuleType:
    """Import the file that knows the class of ``vit``."""
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a torch.nn.Module, got {type(vit).__name__}")
    family = _file_of(vit)
    if family is not None:
        return importlib.import_module(f"{__name__}.{family}")
    names = ", ".join(f"{name.rpartition('.')[2]} ({name})" for name in _FAMILIES)
    inner = [name for name, child in vit.named_children() if _file_of(child)]
    hint = f"; its {inner[0]!r} is one: pass that" if inner else ""
    raise NotImplementedError(f"vit must be one of {names}, got {type(vit).__name__}{hint}")


def _file_of(module: nn.Module) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
