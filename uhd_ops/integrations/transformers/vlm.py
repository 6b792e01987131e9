# SPDX-License-Identifier: Apache-2.0
"""A compressor in the vision tower of a whole vision-language model, and out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from uhd_ops.integrations.transformers.vlm_models import (
    Counts,
    Entry,
    entry_of,
)
from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.nn.modules import Mixed, body_class, is_mixed, mixed, require_version
from uhd_ops.retrofit.families import _hf_checkpoints
from uhd_ops.retrofit.insertion import insert_early_compressor, remove_early_compressor
from uhd_ops.retrofit.registry import takes_compressor

Model = TypeVar("Model", bound=nn.Module)


def compress(model: Model, processor: Any = None, layer: int = 6, **options: Any) -> Model:
    """Insert a compressor into the vision tower of a vision-language model, in place.

    The language model then gets ``ceil(n / window)`` tokens for each side of ``n`` patches, and
    everything that counts them follows: the connector, the methods that put the tiles of an image
    together, and the placeholders that ``processor`` writes into the text. Connectors keep their
    weights. Gemma 3 pools the image to a fixed number of tokens and still does, over smaller
    windows.

    ``save_pretrained`` of model and processor, and the Auto classes in a process that has imported
    ``uhd_ops.integrations.transformers``, give all of it back.

    Args:
        model: A model of transformers with a row of its own in docs/vlms.md:
            ``LlavaForConditionalGeneration`` or ``LlavaModel``, for instance.
        processor: Its processor, which changes in place; None if something else counts the
            placeholders. What ``processor`` counts with must fit ``model``, with or without the
            compressor.
        layer: 0-based index of the tower's block after which the tokens are merged.
        **options: As for :func:`uhd_ops.insert_early_compressor`.

    Returns:
        ``model`` itself.

    Raises:
        NotImplementedError: The class of the model is not supported, or its tower is not.
        TypeError: An argument has the wrong type.
        ValueError: An option is out of range; ``processor`` is that of another model; the model
            reads states of its tower in front of the compressor; or no count of merged tokens fits.
            After an error, model and processor are as they were.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig
        >>> from transformers import LlavaConfig, LlavaForConditionalGeneration
        >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        >>> vision = CLIPVisionConfig(**size, num_hidden_layers=3, image_size=32, patch_size=4)
        >>> text = LlamaConfig(**size, num_hidden_layers=1, vocab_size=64)
        >>> config = LlavaConfig(vision_config=vision, text_config=text)
        >>> model = compress(LlavaForConditionalGeneration(config), layer=0)
        >>> model.model.vision_tower.compression.layers
        (0,)
    """
    require_version("transformers", "5.23", "compress")  # older ones were not tried
    inner, entry = _understood(model)
    towers = [getattr(inner, name) for name in entry.towers]
    # A wrong name among the options is refused by the insertion.
    known = {key: value for key, value in options.items() if key in vars(CompressorConfig(0))}
    wanted = CompressorConfig(layer, **known)
    _check_feature_layers(inner.config, wanted)
    if entry.check is not None:
        entry.check(inner.config, wanted)
    counts = _checked_counts(entry, inner.config, processor, None, wanted)
    inserted: list[nn.Module] = []
    try:
        for tower in towers:
            new = not hasattr(tower, "compression")
            insert_early_compressor(tower, layer, **options)
            inserted += [tower] if new else []
    except Exception:
        for tower in inserted:
            remove_early_compressor(tower)
        raise
    _adapt(inner)
    _set(processor, counts)
    return model


def decompress(model: Model, processor: Any = None) -> Model:
    """Take the compressor of :func:`compress` out again, in place; its weights are lost.

    Args:
        model: The model.
        processor: Its processor, if that was changed too.

    Returns:
        ``model`` itself, with the classes, attributes and parameters that it had before, updated by
        whatever training happened since.

    Raises:
        NotImplementedError: The class of the model is not supported, or somebody extended a class
            that :func:`compress` gave to one of its parts.
        ValueError: The model holds no compressor, or ``processor`` is that of another model.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig
        >>> from transformers import LlavaConfig, LlavaForConditionalGeneration
        >>> size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        >>> vision = CLIPVisionConfig(**size, num_hidden_layers=3, image_size=32, patch_size=4)
        >>> text = LlamaConfig(**size, num_hidden_layers=1, vocab_size=64)
        >>> config = LlavaConfig(vision_config=vision, text_config=text)
        >>> model = compress(LlavaForConditionalGeneration(config), layer=0)
        >>> hasattr(decompress(model).model.vision_tower, "compression")
        False
    """
    require_version("transformers", "5.23", "compress")  # older ones were not tried
    inner, entry = _understood(model)
    towers = [getattr(inner, name) for name in entry.towers]
    for name, tower in zip(entry.towers, towers, strict=True):
        if not hasattr(tower, "compression"):
            raise ValueError(
                f"model holds no compressor in its {name!r}, so there is none to remove"
            )
    parts = [inner.get_submodule(name) for name in entry.parts]
    parts = [part for part in parts if isinstance(part, Mixed)]
    for part in parts:
        if not is_mixed(type(part)):
            raise NotImplementedError(
                "model and its parts must have the classes that compress gave them, got "
                f"{type(part).__name__}: undo what extended it (a parametrization, say) first"
            )
    counts = _checked_counts(entry, inner.config, processor, towers[0].compression, None)
    for tower in towers:
        remove_early_compressor(tower)
    for part in parts:
        part.__class__ = part.body_class
    _set(processor, counts)
    return model


def _understood(model: nn.Module) -> tuple[Any, Entry]:
    """The part of a model whose class has an entry, and that entry."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        entry = entry_of(module)
        if entry is not None:
            return module, entry
    cls = body_class(model)
    inner = [name for name, module in model.named_modules() if name and takes_compressor(module)]
    if takes_compressor(model):
        more = "it is a vision transformer: pass it to uhd_ops.insert_early_compressor"
    elif inner:
        more = (
            f"its {inner[0]!r} takes one by itself, by uhd_ops.insert_early_compressor, and then "
            "gives ceil(h / 2) * ceil(w / 2) tokens for a grid of (h, w) patches: what counts them "
            "has to be changed by hand"
        )
    else:
        more = "nothing in it is a vision transformer that takes a compressor"
    raise NotImplementedError(
        f"it is not known where the model counts its image tokens, and {more}; got "
        f"{cls.__module__}.{cls.__qualname__}. docs/vlms.md lists the models that are known"
    )


def _check_feature_layers(config: Any, wanted: CompressorConfig) -> None:
    """Refuse a model that reads what the tower has in front of the compressor."""
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None:
        return
    chosen = chosen if isinstance(chosen, Sequence) else [chosen]
    depth = config.vision_config.num_hidden_layers
    states = [index if index >= 0 else depth + 1 + index for index in chosen]
    if min(states) <= wanted.layers[-1]:
        raise ValueError(
            f"layer must be below {min(states)}, because the model reads the states behind as many "
            f"blocks of its tower (vision_feature_layer={config.vision_feature_layer}), got "
            f"{wanted.layers[-1]}"
        )


def _checked_counts(
    entry: Entry,
    config: Any,
    processor: Any,
    present: CompressorConfig | None,
    wanted: CompressorConfig | None,
) -> Counts:
    """What a processor must count with, if it fits the model now, or does so already."""
    if processor is None:
        return {}
    before, after = entry.counts(config, present), entry.counts(config, wanted)
    try:
        found = {name: _attribute(processor, name) for name in before}
    except AttributeError as error:
        raise ValueError(
            f"processor must be that of the model, with {', '.join(before)}, got "
            f"{type(processor).__name__}"
        ) from error
    if found not in (before, after):
        shown = ", ".join(f"{name}={value}" for name, value in before.items())
        got = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"processor must count for the model's tower, by {shown}, got {got}")
    return after


def _attribute(processor: Any, name: str) -> Any:
    for part in name.split("."):
        processor = getattr(processor, part)
    return processor


def _set(processor: Any, counts: Counts) -> None:
    for name, value in counts.items():
        owner, _, attribute = name.rpartition(".")
        setattr(_attribute(processor, owner) if owner else processor, attribute, value)


def _adapt(model: Any) -> None:
    """Let a model, if it has an entry and its towers have compressors, count merged tokens."""
    entry = entry_of(model)
    if entry is None:
        return
    if all(hasattr(getattr(model, name, None), "compression") for name in entry.towers):
        for name, mixin in entry.parts.items():
            part = model.get_submodule(name)
            if not isinstance(part, mixin):
                part.__class__ = mixed(mixin, type(part))


_hf_checkpoints.ADAPT.append(_adapt)
