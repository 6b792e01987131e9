# SPDX-License-Identifier: Apache-2.0
"""Patch and position embedding of packed views, by the parameters of a timm VisionTransformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from uhd_ops import _checks
from uhd_ops._reclass import is_mixed
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.block_spec import read_block


def check_host(vit: nn.Module) -> None:
    """Refuse a model that a slice encoder does not understand."""
    try:
        from timm.models import vision_transformer as timm
        from timm.models.deit import VisionTransformerDistilled
    except ImportError as error:
        raise ImportError("a SliceEncoder needs timm: pip install uhd_ops[timm]") from error

    if not isinstance(vit, timm.VisionTransformer):
        raise NotImplementedError(f"vit must be timm's VisionTransformer, got {type(vit).__name__}")
    known = (timm.VisionTransformer, VisionTransformerDistilled)
    for cls in type(vit).__mro__:
        ours = is_mixed(cls)
        replaced = {"forward_features", "_pos_embed"} & vars(cls).keys()
        if replaced and not ours and cls not in known:
            raise NotImplementedError(
                f"vit must leave VisionTransformer.{min(replaced)} as it is, but {cls.__name__} "
                "replaces it"
            )
    patched = {"forward_features", "_pos_embed"} & vars(vit).keys()
    if patched:
        raise NotImplementedError(
            f"vit must leave VisionTransformer.{min(patched)} as it is, but it has one of its own"
        )
    conv = getattr(vit.patch_embed, "proj", None)
    if type(vit.patch_embed) is not timm.PatchEmbed or conv.kernel_size != conv.stride:
        raise NotImplementedError(
            f"vit.patch_embed must be timm's PatchEmbed, got {type(vit.patch_embed).__name__}"
        )
    prefix = sum(token.shape[1] for token in prefix_tokens(vit))
    if prefix != vit.num_prefix_tokens:
        raise NotImplementedError(
            f"vit must have as many class, distillation and register tokens as num_prefix_tokens = "
            f"{vit.num_prefix_tokens}, got {prefix}"
        )
    for block in vit.blocks:
        read_block(block)


def prefix_tokens(vit: nn.Module) -> list[torch.Tensor]:
    """Return the class, distillation and register tokens that stand in front of the patches."""
    names = ("cls_token", "dist_token", "reg_token")
    tokens = (getattr(vit, name, None) for name in names)
    return [token for token in tokens if token is not None]


def to_patches(vit: nn.Module, views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, PackedGrids]:
    """Cut views ``(3, H, W)`` of any sizes into patches ``(N, 3, p, p)``, raster order."""
    rows, cols = vit.patch_embed.patch_size
    patches, grids = [], []
    for index, view in enumerate(views):
        _check_view(vit, view, f"views[{index}]")
        view = _pad(view, rows, cols)
        height, width = view.shape[1] // rows, view.shape[2] // cols
        tiles = view.unflatten(2, (width, cols)).unflatten(1, (height, rows))
        patches.append(tiles.permute(1, 3, 0, 2, 4).flatten(0, 1))
        grids.append((height, width))
    if not patches:
        weight = vit.patch_embed.proj.weight
        return weight.new_empty((0, *weight.shape[1:])), PackedGrids([])
    return torch.cat(patches), PackedGrids(grids)


def check_patches(vit: nn.Module, pixels: torch.Tensor, grids: Grids) -> PackedGrids:
    """Check packed patches against the model and their grids."""
    weight = vit.patch_embed.proj.weight
    _check_pixels(pixels, "views", weight)
    grids = PackedGrids.of(grids)
    expected = (grids.num_tokens, *weight.shape[1:])
    if pixels.shape != expected:
        raise ValueError(
            f"views must be (N, 3, p, p) = {expected} for these grids and this model, got shape "
            f"{tuple(pixels.shape)}"
        )
    return grids


def embed(
    vit: nn.Module, pixels: torch.Tensor, grids: PackedGrids
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed packed patches.

    Returns:
        The prefix tokens of every view, ``(S, P, C)``, and the patch tokens, ``(N, C)``.
    """
    conv = vit.patch_embed.proj
    x = functional.linear(pixels.flatten(1), conv.weight.flatten(1), conv.bias)
    x = vit.patch_embed.norm(x)
    prefix = torch.cat([*prefix_tokens(vit), x.new_empty((1, 0, x.shape[1]))], 1)
    if vit.pos_embed is not None:
        in_front = 0 if vit.no_embed_class else vit.num_prefix_tokens
        if in_front:
            prefix = prefix + vit.pos_embed[:, :in_front]
        x = x + _positions(vit, grids, in_front)
        prefix, x = vit.pos_drop(prefix.expand(len(grids), -1, -1)), vit.pos_drop(x)
    prefix = prefix.expand(len(grids), -1, -1)
    return vit.norm_pre(prefix), vit.norm_pre(x)


def _positions(vit: nn.Module, grids: PackedGrids, in_front: int) -> torch.Tensor:
    """Position embeddings of all patches, ``(N, C)``, resampled once for each distinct grid."""
    from timm.layers import resample_abs_pos_embed

    table = {}
    for grid in dict.fromkeys(grids):
        if 0 in grid:
            table[grid] = vit.pos_embed[0, :0]
            continue
        resampled = resample_abs_pos_embed(
            vit.pos_embed,
            new_size=list(grid),
            old_size=list(vit.patch_embed.grid_size),
            num_prefix_tokens=in_front,
        )
        table[grid] = resampled[0, in_front:]
    return torch.cat([vit.pos_embed[0, :0], *(table[grid] for grid in grids)])


def _check_view(vit: nn.Module, view: torch.Tensor, name: str) -> None:
    weight = vit.patch_embed.proj.weight
    _check_pixels(view, name, weight)
    channels, rows, cols = weight.shape[1:]
    if view.dim() != 3 or view.shape[0] != channels:
        raise ValueError(f"{name} must be ({channels}, H, W), got shape {tuple(view.shape)}")
    whole = view.shape[1] % rows == 0 and view.shape[2] % cols == 0
    if not (whole or vit.patch_embed.dynamic_img_pad):
        raise ValueError(
            f"{name} must have sides that are multiples of the patch, {rows} x {cols} px, got "
            f"{view.shape[1]} x {view.shape[2]} px (height x width)"
        )


def _check_pixels(pixels: torch.Tensor, name: str, weight: torch.Tensor) -> None:
    _checks.check_tensor(pixels, name)
    autocast = pixels.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(
        pixels.device.type
    )
    if not autocast:
        _checks.check_like(pixels, name, weight, "the model's parameters")


def _pad(view: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return functional.pad(view, (0, -view.shape[2] % cols, 0, -view.shape[1] % rows))
