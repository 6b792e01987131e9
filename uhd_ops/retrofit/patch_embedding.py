# SPDX-License-Identifier: Apache-2.0
"""Refined patch embedding: a trained patch embedding at another patch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import check_positive_int
from uhd_ops.nn.modules import Model

# Classes of timm whose set_input_size resamples the kernel and everything that depends on the grid.
_CLASSES = ("VisionTransformer", "Eva", "Beit", "VisionTransformerRelPos")
_MODULES = ("vision_transformer", "eva", "beit", "vision_transformer_relpos")
_MOONVIT = "transformers.models.kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel"


@dataclass(frozen=True)
class PatchRefinement:
    """What a refinement did.

    Attributes:
        old_patch_size: Side of a patch before, in px.
        new_patch_size: Side of a patch now, in px.
        residual: Relative error ``|B^T w_new - w_old| / |w_old|`` of the kernel, where B resizes a
            patch: how much of the old kernel the new one cannot express. 0 for larger patches.
    """

    old_patch_size: int
    new_patch_size: int
    residual: float


def refine_patch_embedding(
    vit: Model, patch_size: int, *, img_size: int | tuple[int, int] | None = None
) -> Model:
    """Change the side of a patch, in place, so that the model sees a finer or coarser grid.

    The kernel becomes the one whose products with a resized patch are closest to those of the old
    kernel with the patch as it was: with the matrix B of the bicubic, antialiased resize, ``w_new =
    pinv(B^T) w_old`` for each colour channel and output. For larger patches that is exact; for
    smaller ones it is a least-squares fit, whose residual is reported: near zero for the smooth
    kernels of trained models, ``sqrt(1 - (new / old)²)`` for white noise. The bias stays. Position
    embeddings, rotary tables and relative-position tables follow the new grid as timm's
    ``set_input_size`` resamples them; the linear algebra is timm's and runs in float32. MoonViT
    resamples its positions for every image by itself, and its ``config.patch_size`` follows; the
    linear algebra runs in float64 on the CPU.

    Call it before training, and before or after :func:`uhd_ops.insert_early_compressor`.

    Args:
        vit: timm's ``VisionTransformer``, ``Eva``, ``Beit`` or ``VisionTransformerRelPos``, or a
            class built on one of them, with a plain ``PatchEmbed``; or MoonViT, the
            ``Kimi_K25VisionModel`` of transformers.
        patch_size: Side of a patch from now on, in px; square patches only.
        img_size: Size of an image from now on, in px, one side or (height, width); None keeps it.
            It must be a multiple of ``patch_size``, and None for MoonViT, which takes any size.

    Returns:
        ``vit`` itself; ``vit.patch_refinement`` is a :class:`PatchRefinement`. A parameter that
        changed its shape is a new one, which an optimiser made before does not know.

    Raises:
        NotImplementedError: The class of the model or of its patch embedding is not supported.
        TypeError: An argument has the wrong type.
        ValueError: A size is not positive, or ``img_size`` is no multiple of ``patch_size`` or is
            given for MoonViT. In every case of an error, the model is as it was.

    Source:
        LLaVA-UHD v3, refined patch embedding; the same formula as FlexiViT's PI-resize.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=80, patch_size=16, embed_dim=32, depth=1, num_heads=2)
        >>> refine_patch_embedding(vit, 10).patch_embed.grid_size
        (8, 8)
    """
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a torch.nn.Module, got {type(vit).__name__}")
    moonvit = _MOONVIT in _names(vit)
    _check_model(vit, moonvit)
    patch_size = check_positive_int(patch_size, "patch_size")
    embed = vit.patch_embed
    old_size, old_weight = embed.proj.kernel_size[0], embed.proj.weight.detach().clone()
    if moonvit:
        if img_size is not None:
            raise ValueError(f"img_size must be None for MoonViT, got {img_size}")
        _resample(embed.proj, patch_size)
        vit.config.patch_size = patch_size
        residual = kernel_residual(old_weight, embed.proj.weight)
        vit.patch_refinement = PatchRefinement(old_size, patch_size, residual)
        return vit
    size = embed.img_size if img_size is None else _pair(img_size)
    if any(side % patch_size for side in size):
        raise ValueError(
            f"img_size must be a multiple of patch_size = {patch_size} px, got "
            f"{size[0]} x {size[1]} px (height x width); choose another with img_size=..."
        )
    vit.set_input_size(img_size=size, patch_size=(patch_size, patch_size))
    for info in getattr(vit, "feature_info", []):
        info["reduction"] = info["reduction"] * patch_size // old_size
    residual = kernel_residual(old_weight, embed.proj.weight)
    vit.patch_refinement = PatchRefinement(old_size, patch_size, residual)
    return vit


@torch.no_grad()
def kernel_residual(old: torch.Tensor, new: torch.Tensor) -> float:
    """Relative error of a resampled kernel; see :class:`PatchRefinement`.

    Args:
        old: ``(D, 3, p, p)``.
        new: ``(D, 3, q, q)``.
    """
    if old.shape == new.shape or old.is_meta:
        return 0.0
    resized = _resized_impulses(old.shape[-1], new.shape[-1])
    old, new = (weight.double().cpu().flatten(2) for weight in (old, new))
    norm = old.norm()
    return float((new @ resized.T - old).norm() / norm) if norm else 0.0


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one side or (height, width), got {img_size}")
    return tuple(check_positive_int(side, "img_size") for side in sides)


def _resized_impulses(side: int, new_side: int) -> torch.Tensor:
    """The transposed matrix of the resize: row i is what becomes of pixel i, ``(p², q²)``."""
    impulses = torch.eye(side**2, dtype=torch.float64).view(side**2, 1, side, side)
    size = new_side, new_side
    return functional.interpolate(impulses, size=size, mode="bicubic", antialias=True).flatten(1)


def _resample(conv: nn.Conv2d, side: int) -> None:
    """Give a convolution another kernel; one of that size stays the parameter that it is."""
    old = conv.weight
    if old.shape[-1] == side:
        return
    if old.is_meta:
        kernel = old.new_empty((*old.shape[:2], side, side))
    else:
        inverse = torch.linalg.pinv(_resized_impulses(old.shape[-1], side).T)
        kernel = old.detach().double().cpu().flatten(2) @ inverse
        kernel = kernel.unflatten(-1, (side, side)).to(old)
    conv.weight = nn.Parameter(kernel, requires_grad=old.requires_grad)
    conv.kernel_size = conv.stride = (side, side)


def _names(vit: nn.Module) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(vit).__mro__]


def _check_model(vit: nn.Module, moonvit: bool) -> None:
    known = {f"timm.models.{m}.{c}" for m, c in zip(_MODULES, _CLASSES, strict=True)}
    if not moonvit and known.isdisjoint(_names(vit)):
        raise NotImplementedError(
            f"vit must be one of timm's {', '.join(_CLASSES)}, or MoonViT of transformers, got "
            f"{type(vit).__name__}"
        )
    embed = vit.patch_embed
    conv = getattr(embed, "proj", None)
    name = "Kimi_K25VisionPatchEmbed" if moonvit else "PatchEmbed"
    plain = type(embed).__name__ == name and type(conv) is nn.Conv2d
    if not plain or conv.kernel_size != conv.stride or conv.stride[0] != conv.stride[1]:
        raise NotImplementedError(
            f"vit.patch_embed must be a plain {name} with square patches, got "
            f"{type(embed).__name__}"
        )
