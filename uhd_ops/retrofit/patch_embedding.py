# SPDX-License-Identifier: Apache-2.0
"""Refined patch embedding: a trained patch embedding at another patch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import check_positive_int
from uhd_ops.nn.modules import Model

Interpolation = Literal["bicubic", "bilinear", "area", "nearest-exact"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
_FILTERED = ("bicubic", "bilinear")  # what torch can antialias

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
        interpolation: The mode of that resize.
        antialias: Whether the resize was antialiased.
    """

    old_patch_size: int
    new_patch_size: int
    residual: float
    interpolation: Interpolation
    antialias: bool


def refine_patch_embedding(
    vit: Model,
    patch_size: int,
    *,
    img_size: int | tuple[int, int] | None = None,
    interpolation: Interpolation = "bicubic",
    antialias: bool = True,
) -> Model:
    """Change the side of a patch, in place, so that the model sees a finer or coarser grid.

    The kernel becomes the one whose products with a resized patch are closest to those of the old
    kernel with the patch as it was: with the matrix B of the resize, ``w_new = pinv(B^T) w_old``
    for each colour channel and output, in float64 on the CPU. For larger patches that is exact; for
    smaller ones it is a least-squares fit, whose residual is reported: near zero for the smooth
    kernels of trained models, ``sqrt(1 - (new / old)²)`` for white noise. The bias stays. Position
    embeddings, rotary tables and relative-position tables follow the new grid as timm's
    ``set_input_size`` resamples them. MoonViT resamples its positions for every image by itself,
    and its ``config.patch_size`` follows.

    Call it before training, and before or after :func:`uhd_ops.insert_early_compressor`.

    Args:
        vit: timm's ``VisionTransformer``, ``Eva``, ``Beit`` or ``VisionTransformerRelPos``, or a
            class built on one of them, with a plain ``PatchEmbed``; or MoonViT, the
            ``Kimi_K25VisionModel`` of transformers.
        patch_size: Side of a patch from now on, in px; square patches only.
        img_size: Size of an image from now on, in px, one side or (height, width); None keeps it.
            It must be a multiple of ``patch_size``, and None for MoonViT, which takes any size.
        interpolation: The resize that B stands for, a mode of torch's ``interpolate``; LLaVA-UHD
            v3 does not name its own. Of smooth kernels an antialiased resize from 14 to 10 px loses
            a few percent, one without and ``"area"`` a fifth, and ``"nearest-exact"``, which looks
            at one pixel for each that it makes, as much as of white noise.
        antialias: Whether the resize is antialiased. ``"area"`` and ``"nearest-exact"`` never are.

    Returns:
        ``vit`` itself; ``vit.patch_refinement`` is a :class:`PatchRefinement`. A parameter that
        changed its shape is a new one, which an optimiser made before does not know.

    Raises:
        NotImplementedError: The class of the model or of its patch embedding is not supported.
        TypeError: An argument has the wrong type.
        ValueError: A size is not positive, ``img_size`` is not a multiple of ``patch_size`` or is
            given for MoonViT, or ``interpolation`` is none of the four. After an error, the model
            is as it was.

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
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(f'"{name}"' for name in INTERPOLATIONS)
        raise ValueError(f"interpolation must be one of {known}, got {interpolation!r}")
    if not isinstance(antialias, bool):
        raise TypeError(f"antialias must be a bool, got {type(antialias).__name__}")
    antialias = antialias and interpolation in _FILTERED
    embed = vit.patch_embed
    old_size, size = embed.proj.kernel_size[0], None
    if moonvit and img_size is not None:
        raise ValueError(f"img_size must be None for MoonViT, got {img_size}")
    if not moonvit:
        size = embed.img_size if img_size is None else _pair(img_size)
        if any(side % patch_size for side in size):
            raise ValueError(
                f"img_size must be a multiple of patch_size = {patch_size} px, got "
                f"{size[0]} x {size[1]} px (height x width); choose another with img_size=..."
            )
    resize = _resized_impulses(old_size, patch_size, interpolation, antialias)
    kernel, residual = _resampled(embed.proj.weight, resize)
    if moonvit:
        vit.config.patch_size = patch_size
    else:  # with a kernel of its own, which is replaced
        vit.set_input_size(img_size=size, patch_size=(patch_size, patch_size))
        for info in getattr(vit, "feature_info", []):
            info["reduction"] = info["reduction"] * patch_size // old_size
    if patch_size != old_size:
        requires_grad = embed.proj.weight.requires_grad
        embed.proj.weight = nn.Parameter(kernel, requires_grad=requires_grad)
        embed.proj.kernel_size = embed.proj.stride = (patch_size, patch_size)
    vit.patch_refinement = PatchRefinement(old_size, patch_size, residual, interpolation, antialias)
    return vit


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one side or (height, width), got {img_size}")
    return tuple(check_positive_int(side, "img_size") for side in sides)


def _resized_impulses(
    side: int, new_side: int, interpolation: Interpolation, antialias: bool
) -> torch.Tensor:
    """The transposed matrix of the resize: row i is what becomes of pixel i, ``(p², q²)``."""
    impulses = torch.eye(side**2, dtype=torch.float64, device="cpu").view(side**2, 1, side, side)
    size = new_side, new_side
    resized = functional.interpolate(impulses, size=size, mode=interpolation, antialias=antialias)
    return resized.flatten(1)


@torch.no_grad()
def _resampled(old: torch.Tensor, resize: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a kernel for resized patches, and its residual.

    Args:
        old: ``(D, 3, p, p)``, also on the meta device.
        resize: The transposed matrix of the resize, ``(p², q²)``.
    """
    side = math.isqrt(resize.shape[1])
    if old.shape[-1] == side:
        return old, 0.0
    if old.is_meta:
        return old.new_empty((*old.shape[:2], side, side)), 0.0
    exact = old.double().cpu().flatten(2)
    kernel = (exact @ torch.linalg.pinv(resize.T)).unflatten(-1, (side, side)).to(old)
    norm = exact.norm()
    missed = kernel.double().cpu().flatten(2) @ resize.T - exact  # of the kernel as it is rounded
    return kernel, float(missed.norm() / norm) if norm else 0.0


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
