# SPDX-License-Identifier: Apache-2.0
"""Read the sizes of a timm ViT, and of a compressor inserted into it, for counting."""

from __future__ import annotations

from torch import nn

from uhd_ops.flops.config import CompressorConfig, ViTConfig
from uhd_ops.flops.count import count_vit
from uhd_ops.flops.report import FlopReport
from uhd_ops.grids import Grids


def of_vit(
    vit: nn.Module,
    grids: Grids,
    *,
    counting: str = "macs",
    full_window_attention: bool | None = None,
) -> FlopReport:
    """Count the operations of a timm ``VisionTransformer``, an inserted compressor included.

    Args:
        vit: The model; only its sizes are read, so it may be on the meta device.
        grids: Patch grids of the views, in any accepted form.
        counting: See :func:`uhd_ops.flops.count_vit`.
        full_window_attention: See :func:`uhd_ops.flops.count_vit`.

    Returns:
        Rows for the patch embedding, every block and the compressor; heads are left out.

    Raises:
        NotImplementedError: The model is no plain ViT with one block size, joint qkv projection and
            two-layer MLP.
        TypeError: ``grids`` has no accepted form.
        ValueError: ``counting`` is unknown.

    Example:
        >>> import timm
        >>> with torch.device("meta"):  # sizes only, no weights
        ...     vit = timm.create_model("vit_base_patch16_siglip_512")
        >>> round(of_vit(vit, [(32, 32)]).giga, 1)
        106.9
    """
    return count_vit(
        vit_config(vit),
        grids,
        compressor_config(vit),
        counting=counting,
        full_window_attention=full_window_attention,
    )


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
    try:
        projection = vit.patch_embed.proj.weight
        sizes = {_block_sizes(block) for block in vit.blocks}
        depth, prefix_tokens = len(vit.blocks), vit.num_prefix_tokens
    except AttributeError as error:
        raise NotImplementedError(
            f"vit must be a plain timm VisionTransformer, got {name}: {error}"
        ) from None
    if len(sizes) != 1:
        raise NotImplementedError(
            f"vit must have blocks of one size, got {name} with {len(sizes)} sizes"
        )
    if projection.dim() != 4 or projection.shape[2] != projection.shape[3]:
        raise NotImplementedError(
            f"vit must embed square patches with one convolution, got {name} with weights "
            f"{tuple(projection.shape)}"
        )
    dim, heads, mlp_hidden = sizes.pop()
    return ViTConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_hidden=mlp_hidden,
        patch=projection.shape[-1],
        in_channels=projection.shape[1],
        prefix_tokens=prefix_tokens,
    )


def compressor_config(vit: nn.Module) -> CompressorConfig | None:
    """Read the structure of the early compressor inserted into a ViT.

    Args:
        vit: The model.

    Returns:
        The structure, or None for a model without a compressor.
    """
    for layer, block in enumerate(vit.blocks):
        compressor = getattr(block, "compressor", None)
        if compressor is not None:
            return CompressorConfig(
                layer=layer,
                attention="window" if compressor.attention else None,
                form=compressor.form,
                window=compressor.window,
            )
    return None


def _block_sizes(block: nn.Module) -> tuple[int, int, int]:
    """Width, heads and hidden width of a block that has the counted matrices and no others."""
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
