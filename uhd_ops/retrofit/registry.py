# SPDX-License-Identifier: Apache-2.0
"""Which classes of models take a compressor, and which file knows each of them."""

from __future__ import annotations

import importlib

from torch import nn

from uhd_ops.retrofit import refusals
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.model import Family

# One file per family; it is imported when a model of that class turns up, so that nothing is
# imported which the caller does not have. Subclasses belong to the first class that they extend.
_FAMILIES = {
    "timm.models.beit.Beit": "timm_beit",
    "timm.models.cait.Cait": "timm_cait",
    "timm.models.gemma4_vit.Gemma4VitClassifier": "timm_gemma4",
    "timm.models.gemma4_vit.Gemma4VitEncoder": "timm_gemma4",
    "timm.models.naflexvit.NaFlexVit": "timm_naflexvit",
    "timm.models.deepseek_vit.DeepseekVitClassifier": "timm_deepseek",
    "timm.models.deepseek_vit.DeepseekVitEncoder": "timm_deepseek",
    "timm.models.eva.Eva": "timm_eva",
    "timm.models.qwen3_vit.Qwen3VitClassifier": "timm_qwen3",
    "timm.models.qwen3_vit.Qwen3VitEncoder": "timm_qwen3",
    "timm.models.vision_transformer.VisionTransformer": "timm_vision_transformer",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": "timm_relpos",
    "timm.models.vision_transformer_sam.VisionTransformerSAM": "timm_sam",
}
_FAMILIES |= {
    f"transformers.models.{model}.modeling_{model}.{prefix}{name}": file
    for file, model, prefix, *names in (
        ("hf_clip", "clip", "CLIP", "VisionModel", "VisionModelWithProjection"),
        ("hf_clip", "clip", "CLIP", "ForImageClassification"),
        ("hf_clip", "siglip", "Siglip", "VisionModel", "ForImageClassification"),
        ("hf_siglip2", "siglip2", "Siglip2", "VisionModel"),
        ("hf_dinov2", "dinov2", "Dinov2", "Model", "ForImageClassification"),
        ("hf_dinov2_backbone", "dinov2", "Dinov2", "Backbone"),
        ("hf_dinov2", "dinov2_with_registers", "Dinov2WithRegisters", "Model"),
        ("hf_dinov2", "dinov2_with_registers", "Dinov2WithRegisters", "ForImageClassification"),
        ("hf_dinov2_backbone", "dinov2_with_registers", "Dinov2WithRegisters", "Backbone"),
        ("hf_dinov3", "dinov3_vit", "DINOv3ViT", "Model"),
        ("hf_dinov3_backbone", "dinov3_vit", "DINOv3ViT", "Backbone"),
    )
    for name in names
}


def family_of(vit: nn.Module, library: str = "") -> Family:
    """Import the file that knows the class of ``vit``, of this library if one is named."""
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a torch.nn.Module, got {type(vit).__name__}")
    family = _file_of(vit, library)
    if family is not None:
        return importlib.import_module(f"uhd_ops.retrofit.{family}").FAMILY
    inner = [name for name, module in vit.named_modules() if _file_of(module, library)]
    why = refusals.reason(vit)
    hint = f": {why}" if why else f"; its {inner[0]!r} is one: pass that" if inner else ""
    raise NotImplementedError(
        f"vit must be one of {_supported(library)}, got {type(vit).__name__}{hint}"
    )


def takes_compressor(module: nn.Module) -> bool:
    """Whether the class of ``module`` is known; parts of it may still be refused."""
    return _file_of(module) is not None


def refuse_other(present: Config | None, config: Config) -> None:
    """Refuse a second insertion with other options: it would lose trained weights."""
    if present is not None and present != config:
        raise ValueError(
            f"vit holds a compressor already, {present}; call {present.removed_by}(vit) before "
            f"inserting {config}"
        )


def _file_of(module: nn.Module, library: str = "") -> str | None:
    names = (name for name in refusals.class_names(module) if name.startswith(library))
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


def _supported(library: str) -> str:
    """The classes that take a compressor, by library."""
    libraries = {}
    for name in _FAMILIES:
        if name.startswith(library):
            origin, *_, cls = name.split(".")
            libraries.setdefault(origin, []).append(cls)
    found = (f"{origin}'s {', '.join(sorted(known))}" for origin, known in libraries.items())
    return "; ".join(found)
