# SPDX-License-Identifier: Apache-2.0
"""Which models take a compressor, and which file knows each of them and its blocks."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import body_class, require_version
from uhd_ops.retrofit import families
from uhd_ops.retrofit.adapter import Family
from uhd_ops.retrofit.packed import PackedModel


class Row(NamedTuple):
    """A family of vision transformers.

    Attributes:
        file: The file in ``uhd_ops/retrofit/families``. It is imported when a model or a block of
            these classes turns up, so that nothing is imported which the caller does not have.
        module: The module that defines the classes.
        models: Models. A subclass of one belongs to the first class in a row that it extends.
        blocks: Blocks, by exact class.
        backbones: Models whose :class:`Family` the file calls ``BACKBONE``.
    """

    file: str
    module: str
    models: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()


FAMILIES = (
    Row("timm_beit", "timm.models.beit", ("Beit",), ("Block",)),
    Row("timm_cait", "timm.models.cait", ("Cait",), ("LayerScaleBlock",)),
    Row(
        "timm_deepseek",
        "timm.models.deepseek_vit",
        ("DeepseekVitClassifier", "DeepseekVitEncoder"),
        ("DeepseekVitBlock",),
    ),
    Row("timm_eva", "timm.models.eva", ("Eva",), ("EvaBlock", "EvaBlockPostNorm")),
    Row(
        "timm_gemma4",
        "timm.models.gemma4_vit",
        ("Gemma4VitClassifier", "Gemma4VitEncoder"),
        ("Gemma4Block",),
    ),
    Row("timm_naflexvit", "timm.models.naflexvit", ("NaFlexVit",)),
    Row("timm_qwen3", "timm.models.qwen3_vit", ("Qwen3VitClassifier", "Qwen3VitEncoder")),
    Row(
        "timm_relpos",
        "timm.models.vision_transformer_relpos",
        ("VisionTransformerRelPos",),
        ("RelPosBlock", "ResPostRelPosBlock"),
    ),
    Row("timm_sam", "timm.models.vision_transformer_sam", ("VisionTransformerSAM",), ("Block",)),
    Row(
        "timm_vision_transformer",
        "timm.models.vision_transformer",
        ("VisionTransformer",),
        (
            "Block",
            "DiffParallelScalingBlock",
            "ParallelScalingBlock",
            "ParallelThingsBlock",
            "ResPostBlock",
        ),
    ),
    Row(
        "hf_clip",
        "transformers.models.clip.modeling_clip",
        ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        ("CLIPEncoderLayer",),
    ),
    Row(
        "hf_clip",
        "transformers.models.siglip.modeling_siglip",
        ("SiglipVisionModel", "SiglipForImageClassification"),
        ("SiglipEncoderLayer",),
    ),
    Row(
        "hf_clip",
        "transformers.models.janus.modeling_janus",
        ("JanusVisionModel",),
        ("JanusVisionEncoderLayer",),
    ),
    *(
        Row(
            "hf_blip",
            f"transformers.models.{module}.modeling_{module}",
            (f"{name}VisionModel",),
            (f"{name}EncoderLayer",),
        )
        for module, name in (
            ("blip", "Blip"),
            ("blip_2", "Blip2"),
            ("instructblip", "InstructBlip"),
            ("instructblipvideo", "InstructBlipVideo"),
        )
    ),
    Row(
        "hf_aimv2",
        "transformers.models.aimv2.modeling_aimv2",
        ("Aimv2VisionModel",),
        ("Aimv2EncoderLayer",),
    ),
    Row(
        "hf_siglip2",
        "transformers.models.siglip2.modeling_siglip2",
        ("Siglip2VisionModel",),
    ),
    # Their layers are read as those of the family before.
    Row("hf_clip", "transformers.models.siglip2.modeling_siglip2", (), ("Siglip2EncoderLayer",)),
    *(
        Row(
            "hf_idefics",
            f"transformers.models.{name.lower()}.modeling_{name.lower()}",
            (f"{name}VisionTransformer",),
            (f"{name}EncoderLayer",),
        )
        for name in ("Idefics2", "Idefics3", "SmolVLM")
    ),
    Row(
        "hf_internvl",
        "transformers.models.internvl.modeling_internvl",
        ("InternVLVisionModel",),
        ("InternVLVisionLayer",),
    ),
    *(
        Row(
            "hf_dinov2",
            f"transformers.models.{module}.modeling_{module}",
            (f"{name}Model", f"{name}ForImageClassification"),
            (f"{name}Layer",),
            (f"{name}Backbone",),
        )
        for module, name in (
            ("dinov2", "Dinov2"),
            ("dinov2_with_registers", "Dinov2WithRegisters"),
        )
    ),
    Row(
        "hf_dinov3",
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
        ("DINOv3ViTModel",),
        backbones=("DINOv3ViTBackbone",),
    ),
    Row("hf_dinov2", "transformers.models.dinov3_vit.modeling_dinov3_vit", (), ("DINOv3ViTLayer",)),
    Row(
        "hf_pixtral",
        "transformers.models.pixtral.modeling_pixtral",
        ("PixtralVisionModel",),
        ("PixtralAttentionLayer",),
    ),
    Row(
        "hf_qwen2_vl",
        "transformers.models.qwen2_vl.modeling_qwen2_vl",
        ("Qwen2VisionTransformerPretrainedModel",),
        ("Qwen2VLVisionBlock",),
    ),
    Row(
        "hf_qwen2_5_vl",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        ("Qwen2_5_VisionTransformerPretrainedModel",),
        ("Qwen2_5_VLVisionBlock",),
    ),
    *(
        Row(
            file,
            f"transformers.models.{module}.modeling_{module}",
            (f"{name}VisionModel",),
            (f"{name}VisionBlock",),
        )
        for file, module, name in (
            ("hf_glm4v", "glm4v", "Glm4v"),
            ("hf_glm4v", "glm4v_moe", "Glm4vMoe"),
            ("hf_qwen3_vl", "qwen3_vl", "Qwen3VL"),
            ("hf_qwen3_vl", "qwen3_vl_moe", "Qwen3VLMoe"),
            ("hf_qwen3_vl", "qwen3_5", "Qwen3_5"),
            ("hf_qwen3_vl", "qwen3_5_moe", "Qwen3_5Moe"),
        )
    ),
    Row(
        "hf_kimi_k25",
        "transformers.models.kimi_k25.modeling_kimi_k25",
        ("Kimi_K25VisionModel",),
        ("Kimi_K25VisionEncoderLayer",),
    ),
)
# The oldest version of its library with which the tests of what a module defines pass.
_SINCE = {
    "timm.models.beit": "1.0.20",
    "timm.models.deepseek_vit": "1.0.30",
    "timm.models.gemma4_vit": "1.0.27",
    "timm.models.naflexvit": "1.0.28",
    "timm.models.vision_transformer": "1.0.20",
    "timm.models.vision_transformer_relpos": "1.0.23",
    "timm.models.vision_transformer_sam": "1.0.23",
    "transformers.models.clip.modeling_clip": "5.6",
    "transformers.models.dinov2.modeling_dinov2": "5.18",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": "5.18",
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "5.9",
    "transformers.models.siglip.modeling_siglip": "5.6",
}
_TRIED = {"timm": "1.0.31", "transformers": "5.23"}  # for all others: in requirements-dev.txt
OWN: dict[type, Family] = {}  # by register_family
# Dotted name of a class -> the file that knows it, and what it is called there.
_MODELS = {
    f"{row.module}.{name}": (row.file, attribute)
    for row in FAMILIES
    for attribute, names in (("FAMILY", row.models), ("BACKBONE", row.backbones))
    for name in names
}
_BLOCKS = {f"{row.module}.{name}": row.file for row in FAMILIES for name in row.blocks}
_REFUSALS = {
    "timm.models.convit.ConVit": "its positional attention takes square grids only",
    "timm.models.crossvit.CrossVit": "two branches of different patch sizes exchange their tokens",
    "timm.models.mlp_mixer.MlpMixer": "it mixes tokens by weights for a fixed number of them",
    "timm.models.pit.PoolingVisionTransformer": "it pools its tokens between stages already",
    "timm.models.tnt.TNT": "every patch token is tied to a sequence of pixel tokens",
    "timm.models.volo.VOLO": "it reduces its tokens behind the outlook attention already",
    "timm.models.xcit.Xcit": "it attends between channels and convolves the patch grid",
    "transformers.models.siglip2.modeling_siglip2.Siglip2ForImageClassification": (
        "its classifier averages over the patches that pixel_attention_mask marks"
    ),
}


def family_of(vit: nn.Module) -> Family:
    """Import the file that knows the class of ``vit``."""
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a torch.nn.Module, got {type(vit).__name__}")
    found = _look_up(vit)
    if isinstance(found, Family):
        return found
    if found is not None:
        return getattr(_import(*found[:2]), found[2])
    inner = [name for name, module in vit.named_modules() if _look_up(module)]
    why = _reason(vit)
    if why:
        reason = f"{why}, so vit takes no compressor"
    elif inner:
        reason = f"vit is not a vision transformer, but its {inner[0]!r} is one: pass that"
    else:
        reason = "vit is of no class that is known"
    raise NotImplementedError(
        f"{reason}; got {_dotted(body_class(vit))}. docs/models.md lists the classes of timm that "
        "are known, docs/own_vit.md shows how to register one of your own"
    )


def is_built_in(cls: type) -> bool:
    """Whether this very class is in a row."""
    return _dotted(cls) in _MODELS


def packed_of(vit: nn.Module) -> tuple[nn.Module, type[PackedModel]]:
    """The transformer in ``vit``, and the class that runs it on packed views."""
    family = family_of(vit)
    return family.transformer(vit), family.packed


def check_packed(vit: nn.Module) -> None:
    """Refuse a model that :class:`uhd_ops.nn.SliceEncoder` does not understand."""
    family = family_of(vit)
    transformer = family.transformer(vit)
    if not hasattr(transformer, "compression"):  # else the insertion has checked it
        family.check(vit, CompressorConfig(0))
    for cls in body_class(transformer).__mro__:
        if cls.__module__.startswith(("timm.", "transformers.")):
            break
        _refuse_replaced(transformer, family.packed, vars(cls), f"{cls.__name__} replaces it")
    _refuse_replaced(transformer, family.packed, vars(transformer), "it has one of its own")
    family.packed.check(transformer)
    one = family.packed(transformer, PackedGrids([(1, 1)]))
    for index in range(len(one.blocks)):
        one.spec(index)


def _refuse_replaced(vit: nn.Module, packed: type[PackedModel], own: object, but: str) -> None:
    for method in packed.methods:
        if method in own:
            known = next(
                cls.__name__
                for cls in body_class(vit).__mro__
                if cls.__module__.startswith(("timm.", "transformers."))
            )
            raise NotImplementedError(f"vit must leave {known}.{method} as it is, but {but}")


def takes_compressor(module: nn.Module) -> bool:
    """Whether the class of a module is known; parts of it may still be refused.

    Args:
        module: Any module.

    Returns:
        True where :func:`uhd_ops.insert_early_compressor` looks further.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> with torch.device("meta"):
        ...     vit = VisionTransformer(depth=2)
        >>> takes_compressor(vit), takes_compressor(vit.blocks)
        (True, False)
    """
    return _look_up(module) is not None


def read_block(block: nn.Module, **context: object) -> BlockSpec:
    """Read a block by the file of its family; see :func:`uhd_ops.nn.block_spec.read_block`."""
    cls = body_class(block)
    name = _dotted(cls)
    if name not in _BLOCKS:
        known = ", ".join(sorted({known.rpartition(".")[2] for known in _BLOCKS}))
        raise NotImplementedError(
            f"block must be one of {known}, got {cls.__name__} ({cls.__module__})"
        )
    return _import(name, _BLOCKS[name]).read(block, **context)


def read_in(family: Family, vit: nn.Module, block: nn.Module) -> BlockSpec:
    """Read a block of a model."""
    return read_block(block) if family.read is None else family.read(vit, block)


def _import(known: str, file: str) -> Any:
    """Import the file that knows a class, by its dotted name, where its library is new enough."""
    defined, library = known.rpartition(".")[0], known.partition(".")[0]
    require_version(library, _SINCE.get(defined, _TRIED[library]), known)
    name = f"{families.__name__}.{file}"
    # torch.compile traces a look-up of what is there, but no import.
    return sys.modules.get(name) or importlib.import_module(name)


def _look_up(module: nn.Module) -> Family | tuple[str, str, str] | None:
    for cls in type(module).__mro__:
        if cls in OWN:
            return OWN[cls]
        name = _dotted(cls)
        if name in _MODELS:
            return name, *_MODELS[name]
    return None


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _reason(vit: nn.Module) -> str | None:
    """Say why a model takes no compressor; None where nothing is known of its class."""
    for cls in type(vit).__mro__:
        if _dotted(cls) in _REFUSALS:
            return _REFUSALS[_dotted(cls)]
    info = getattr(vit, "feature_info", None)
    if isinstance(info, list) and len({stage.get("reduction") for stage in info}) > 1:
        return "its stages reduce the resolution already"
    return None
