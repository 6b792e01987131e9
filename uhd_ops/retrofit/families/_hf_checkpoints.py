# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers keep their compressors, whoever loads them.

Importing this module extends five functions of transformers, once for the process:

* ``save_pretrained`` writes the options of every compressor in a model to ``config.json``, into the
  config of the part that holds it, and an entry in ``id2label`` which no config can be read with.
  A process that does not know this package therefore stops at the config, with an error that says
  what to import, instead of loading everything but the compressor.
* Reading a config takes that entry out again. A model made from the config makes its compressors,
  in ``post_init``, before ``from_pretrained`` loads their weights: ``AutoModel``, shards, device
  maps and quantisation need nothing else.

The options are in a config only while it is written, and in one that was read: models that share
one config object do not see each other's compressors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from uhd_ops.nn.early_compressor import CompressorConfig
from uhd_ops.retrofit.insertion import insert
from uhd_ops.retrofit.registry import takes_compressor

ADAPT: list[Callable[[PreTrainedModel], None]] = []  # called with every new model, complete
OPTIONS = "uhd_ops_compression"  # in a config: path of a model inside -> options of its compressor
_LOCK = (
    "uhd_ops: this checkpoint holds a compressor; import uhd_ops.integrations.transformers before "
    "loading it"
)


@contextlib.contextmanager
def _noted(model: PreTrainedModel) -> Iterator[None]:
    """Tell the configs inside the model's of the compressors that it holds, and of no others."""
    configs = {id(config): config for config in _configs(model.config)}
    read = {key: vars(config).pop(OPTIONS, None) for key, config in configs.items()}
    try:
        for path, vit in model.named_modules():
            compression = getattr(vit, "compression", None)
            if isinstance(compression, CompressorConfig) and hasattr(vit, "blocks_name"):
                owner, inner = _owner(model, path, configs)
                options = vars(owner.config).setdefault(OPTIONS, {})
                options[inner] = dataclasses.asdict(compression)
        yield
    finally:
        for key, config in configs.items():
            vars(config).pop(OPTIONS, None)
            if read[key] is not None:
                setattr(config, OPTIONS, read[key])


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _owner(
    model: PreTrainedModel, path: str, configs: dict[int, Any]
) -> tuple[PreTrainedModel, str]:
    """The smallest model around ``path`` with a config of its own, and the path inside it."""
    inner = ""
    while path:
        owner = model.get_submodule(path)
        config = getattr(owner, "config", None)
        if id(config) in configs:
            alike = (m for m in model.modules() if getattr(m, "config", None) is config)
            if sum(isinstance(m, getattr(owner, "body_class", type(owner))) for m in alike) == 1:
                return owner, inner
        path, _, name = path.rpartition(".")
        inner = f"{name}.{inner}" if inner else name
    return model, inner


def _build(model: PreTrainedModel) -> None:
    """Insert the compressors that the model's config describes."""
    for path, options in (getattr(model.config, OPTIONS, None) or {}).items():
        try:
            vit = model.get_submodule(path)
        except AttributeError:
            continue  # a part of the model that the options are meant for, with the same config
        if takes_compressor(vit):
            insert(vit, **options)


def _changed(config: Any, change: Callable[[dict[str, str]], dict[str, str]]) -> Any:
    """Change the labels of every config inside that describes a compressor."""
    if not isinstance(config, dict):
        return config
    config = {key: _changed(value, change) for key, value in config.items()}
    if OPTIONS in config:
        labels = change(config.pop("id2label", None) or {})
        config |= {"id2label": labels} if labels else {}
    return config


def _locked(labels: dict[str, str]) -> dict[str, str]:
    return {**labels, _LOCK: ""}


def _unlocked(labels: dict[str, str]) -> dict[str, str]:
    """Undo it, also where another version of this package wrote the text."""
    return {key: value for key, value in labels.items() if not key.startswith("uhd_ops:")}


def _require_all(model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a checkpoint and a config that disagree about the compressors."""
    missing = [key for key in info["missing_keys"] if ".compressor." in key]
    if missing:
        raise ValueError(
            "the checkpoint must hold all weights of the compressor that its config describes; "
            f"missing are {', '.join(sorted(missing))}"
        )
    paths = {
        key.partition(".compressor.")[0] for key in info["unexpected_keys"] if ".compressor." in key
    }
    names = [f".{name}" for name, _ in model.named_modules()]
    lost = [path for path in sorted(paths) if any(name.endswith(f".{path}") for name in names)]
    if lost:
        raise ValueError(
            f"config must describe the compressor that the checkpoint holds in {', '.join(lost)}, "
            "as the checkpoint's own config.json does, got a config that does not"
        )


def _extend(cls: type, name: str) -> Any:
    """Replace a method by ``function(original, self or cls, ...)``."""

    def decorate(function: Any) -> Any:
        method = vars(cls)[name]
        original = getattr(method, "__func__", method)

        @functools.wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(cls, name, classmethod(extended) if method is not original else extended)
        return function

    return decorate


@_extend(PreTrainedModel, "save_pretrained")
def _save_pretrained(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    with _noted(model):
        return original(model, *args, **kwargs)


@_extend(PreTrainedModel, "from_pretrained")
def _from_pretrained(
    original: Any, cls: type, *args: Any, output_loading_info: bool = False, **kwargs: Any
) -> Any:
    cls = vars(cls).get("body_class", cls)  # of a model that holds a compressor
    model, info = original(cls, *args, output_loading_info=True, **kwargs)
    _require_all(model, info)
    return (model, info) if output_loading_info else model


@_extend(PreTrainedModel, "post_init")
def _post_init(original: Any, model: Any) -> None:
    original(model)
    _build(model)
    for adapt in ADAPT:
        adapt(model)


@_extend(PreTrainedConfig, "to_json_string")
def _to_json_string(original: Any, config: Any, *args: Any, **kwargs: Any) -> str:
    text = original(config, *args, **kwargs)
    if f'"{OPTIONS}"' not in text:
        return text
    return json.dumps(_changed(json.loads(text), _locked), indent=2, sort_keys=True) + "\n"


@_extend(PreTrainedConfig, "_dict_from_json_file")
def _dict_from_json_file(original: Any, cls: type, *args: Any) -> Any:
    return _changed(original(cls, *args), _unlocked)
