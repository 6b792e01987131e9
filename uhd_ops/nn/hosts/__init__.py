# SPDX-License-Identifier: Apache-2.0
"""Reading the transformer blocks of other libraries, one file per family.

Each file has ``read(block) -> HostBlock`` for the classes that the table names. It changes nothing
and raises NotImplementedError for any part that it does not understand: parts are accepted by exact
type, because a subclass (a quantised or low-rank adapted Linear, say) may compute something else.
"""

from __future__ import annotations

import importlib

from torch import nn

from uhd_ops.nn.host_block import HostBlock

# A file is imported when a block of that class turns up, so that nothing is imported which the
# caller does not have.
_FILES = {
    "timm.models.beit.Block": "timm_beit",
    "timm.models.cait.LayerScaleBlock": "timm_cait",
    "timm.models.gemma4_vit.Gemma4Block": "timm_gemma4",
    "timm.models.deepseek_vit.DeepseekVitBlock": "timm_deepseek",
    "timm.models.eva.EvaBlock": "timm_eva",
    "timm.models.eva.EvaBlockPostNorm": "timm_eva",
    "timm.models.vision_transformer.Block": "timm_vision_transformer",
    "timm.models.vision_transformer.DiffParallelScalingBlock": "timm_parallel_blocks",
    "timm.models.vision_transformer.ParallelScalingBlock": "timm_parallel_blocks",
    "timm.models.vision_transformer.ParallelThingsBlock": "timm_parallel_blocks",
    "timm.models.vision_transformer.ResPostBlock": "timm_vision_transformer",
    "timm.models.vision_transformer_relpos.RelPosBlock": "timm_relpos",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": "timm_relpos",
    "timm.models.vision_transformer_sam.Block": "timm_sam",
}
_FILES |= {
    f"transformers.models.{model}.modeling_{model}.{layer}": file
    for file, model, layer in (
        ("hf_clip", "clip", "CLIPEncoderLayer"),
        ("hf_clip", "siglip", "SiglipEncoderLayer"),
        ("hf_clip", "siglip2", "Siglip2EncoderLayer"),
        ("hf_dino", "dinov2", "Dinov2Layer"),
        ("hf_dino", "dinov2_with_registers", "Dinov2WithRegistersLayer"),
        ("hf_dino", "dinov3_vit", "DINOv3ViTLayer"),
    )
}


def read_block(block: nn.Module, **context: object) -> HostBlock:
    """Read a block, changing nothing.

    Args:
        block: A block of one of the classes in the table above, with or without a compressor.
        context: What the family reads from the model around the block; optional.

    Raises:
        NotImplementedError: Another class, or a part that is not understood.
    """
    cls = body_class(block)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name not in _FILES:
        known = ", ".join(sorted({known.rpartition(".")[2] for known in _FILES}))
        raise NotImplementedError(
            f"block must be one of {known}, got {cls.__name__} ({cls.__module__})"
        )
    return importlib.import_module(f"{__name__}.{_FILES[name]}").read(block, **context)


def body_class(block: nn.Module) -> type:
    """The class whose forward a block runs; one with a compressor names it."""
    cls = type(block)
    while hasattr(cls, "body_class"):
        cls = cls.body_class
    return cls
