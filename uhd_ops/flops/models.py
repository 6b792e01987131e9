# SPDX-License-Identifier: Apache-2.0
"""Count the operations of a model by the grids of the views that it encodes.

Those of a plain ViT follow from its sizes, which are read here; others are traced.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter

import torch
from torch import nn

from uhd_ops.flops.count import FlopReport, LayerCount, ViTConfig, count_vit
from uhd_ops.flops.trace import count_forward
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.early_compressor import CompressorConfig


def of_vit(
    vit: nn.Module,
    grids: Grids,
    *,
    counting: str = "macs",
    full_window_attention: bool | None = None,
) -> FlopReport:
    """Count the operations of a vision transformer, inserted compressors included.

    A plain timm ``VisionTransformer`` is counted from its sizes, on any grids. Any other model that
    takes images is counted by :func:`count_forward` on an image of each grid, which it must be able
    to take.

    Args:
        vit: The model. No weight is read, so it may be on the meta device.
        grids: Patch grids of the views, in any accepted form.
        counting: See :func:`uhd_ops.flops.count_vit`; only ``"macs"`` for models that are not plain
            ViTs.
        full_window_attention: Likewise; only None or False.

    Returns:
        Rows for the patch embedding, every block and the compressor; heads are left out.

    Raises:
        NotImplementedError: The model does not tell the side of its patches, takes other inputs
            than images, or is not a plain ViT and is to be counted in another way than ``"macs"``.
        TypeError: ``grids`` has no accepted form.
        ValueError: ``counting`` is unknown, or the model takes no image of one of the grids.

    Example:
        >>> import timm
        >>> with torch.device("meta"):  # sizes only, no weights
        ...     vit = timm.create_model("vit_base_patch16_siglip_512")
        >>> round(of_vit(vit, [(32, 32)]).giga, 1)
        106.9
    """
    try:
        sizes, compressor = vit_config(vit), compressor_config(vit)
    except NotImplementedError as error:
        if counting != "macs" or full_window_attention:
            raise NotImplementedError(
                f'counting must be "macs" without full_window_attention: {error}'
            ) from None
        return _of_images(vit, PackedGrids.of(grids))
    return count_vit(
        sizes,
        grids,
        compressor,
        counting=counting,
        full_window_attention=full_window_attention,
    )


def _of_images(vit: nn.Module, grids: PackedGrids) -> FlopReport:
    """Add up what one image of each grid costs."""
    sums: dict[str, list[int]] = {}
    for grid, count in Counter(grids).items():
        for layer in _of_image(vit, grid):
            columns = sums.setdefault(layer.name, [0, 0, 0])
            for index, value in enumerate((layer.tokens, layer.linear, layer.attention)):
                columns[index] += count * value
    layers = (LayerCount(name, *columns) for name, columns in sums.items())
    return FlopReport(tuple(layers), "macs")


def _of_image(vit: nn.Module, grid: tuple[int, int]) -> list[LayerCount]:
    patch = patch_size(vit)
    convolutions = (module for module in vit.modules() if isinstance(module, nn.Conv2d))
    channels = next((module.in_channels for module in convolutions), 3)
    height, width = (side * pixels for side, pixels in zip(grid, patch, strict=True))
    dtype = next((p.dtype for p in vit.parameters() if p.is_floating_point()), None)
    image = torch.empty(1, channels, height, width, dtype=dtype, device="meta")
    forward = getattr(vit, "forward_features", vit.forward)
    signature, options = inspect.signature(forward), {}
    # transformers' models with learned positions take other sizes only when told to.
    if "interpolate_pos_encoding" in signature.parameters:
        options["interpolate_pos_encoding"] = True
    try:
        signature.bind(image, **options)
    except TypeError as error:
        raise NotImplementedError(
            f"vit must take images and nothing else, but {type(vit).__name__}: {error}; use "
            "uhd_ops.flops.count_forward with an input of its own"
        ) from None
    try:
        report = count_forward(forward, image, **options)
    except AssertionError as error:  # timm's way to refuse a size
        raise ValueError(
            f"grids must hold grids that {type(vit).__name__} takes, got {grid} for an image of "
            f"{width}x{height} px: {error}"
        ) from error
    first, *others = (layer for layer in report.layers if layer.name != "head")
    return [dataclasses.replace(first, tokens=grid[0] * grid[1]), *others]


def patch_size(vit: nn.Module) -> tuple[int, int]:
    """Return the sides (height, width) of a patch in px, whatever the class of the model.

    Args:
        vit: A model of timm or transformers that takes images.

    Returns:
        The height and the width.

    Raises:
        NotImplementedError: The model does not say.

    Example:
        >>> import timm
        >>> with torch.device("meta"):
        ...     vit = timm.create_model("vit_so400m_patch14_siglip_384")
        >>> patch_size(vit)
        (14, 14)
    """
    for module in (vit, getattr(vit, "encoder", None), getattr(vit, "config", None)):
        for name in ("patch_embed", "embeds"):
            ratio = getattr(getattr(module, name, None), "feat_ratio", None)
            if ratio is not None:
                return tuple(ratio(as_scalar=False))
        size = getattr(module, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    raise NotImplementedError(
        f"vit must tell the side of its patches, got {type(vit).__name__}; use "
        "uhd_ops.flops.count_forward with an input of its own"
    )


def vit_config(vit: nn.Module) -> ViTConfig:
    """Read the sizes of a timm ``VisionTransformer``.

    Args:
        vit: The model, with or without a compressor.

    Returns:
        Its sizes.

    Raises:
        NotImplementedError: The model is not a plain ViT with one block size, joint qkv projection
            and two-layer MLP.

    Example:
        >>> import timm
        >>> with torch.device("meta"):
        ...     vit = timm.create_model("vit_so400m_patch14_siglip_384")
        >>> vit_config(vit) == uhd_ops.flops.SIGLIP_SO400M
        True
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

    Example:
        >>> import timm
        >>> with torch.device("meta"):
        ...     vit = timm.create_model("vit_tiny_patch16_224")
        >>> compressor_config(uhd_ops.insert_early_compressor(vit, layer=3)).layers
        (3,)
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
