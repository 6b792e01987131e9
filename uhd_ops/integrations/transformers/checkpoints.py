# SPDX-License-Identifier: Apache-2.0
"""Weights of MiniCPM-V 4.6 and 4.7 in our modules, and back; values are never changed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from uhd_ops.nn.mlp_forms import MlpWeights, convert_mlp

StateDict = Mapping[str, torch.Tensor]

# Name inside vit_merger -> name in EarlyCompressor; q, k and v are fused on our side.
_COMPRESSOR = {
    "layer_norm1": "attn.norm",
    "self_attn.out_proj": "attn.proj",
    "pre_norm": "mlp.norm",
    "linear_1": "mlp.fc1",
    "linear_2": "mlp.fc2",
}
_MLP = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Name inside merger.mlp.<i> -> name in PixelUnshuffleConnector's stages.<i>.
_STAGE = {"pre_norm": "norm", "linear_1": "fc1", "linear_2": "fc2"}
_KINDS = ("weight", "bias")


def compressor_state_dict(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """Convert the ``vit_merger`` of a checkpoint to the state dict of an EarlyCompressor.

    It loads, with ``strict=True``, into ``EarlyCompressor(hidden_size, num_attention_heads,
    hidden_dim=intermediate_size, eps=layer_norm_eps)``, whose defaults are those of MiniCPM-V: the
    dense form, with biases, and ``activation="gelu_tanh"``.

    Args:
        state_dict: Of the module, of the tower, or of a whole model; other keys are left out.

    Returns:
        The tensors under EarlyCompressor's names. ``attn.qkv`` is a fused copy; all others are the
        same tensors.

    Raises:
        TypeError: ``state_dict`` is not a mapping.
        ValueError: Keys are missing, unknown, or found under several prefixes.

    Example:
        >>> from transformers import MiniCPMV4_6VisionConfig
        >>> from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
        >>> from uhd_ops.nn import EarlyCompressor
        >>> config = MiniCPMV4_6VisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ... )
        >>> tower = MiniCPMV4_6VisionModel(config)
        >>> compressor = EarlyCompressor(32, 2, hidden_dim=64)
        >>> compressor.load_state_dict(compressor_state_dict(tower.state_dict()))
        <All keys matched successfully>
    """
    theirs = (*_QKV, *_COMPRESSOR)
    prefix = _prefix(state_dict, "vit_merger.", f"{_QKV[0]}.weight")
    source = _take(state_dict, prefix, {f"{name}.{kind}" for name in theirs for kind in _KINDS})
    result = {}
    for kind in _KINDS:
        result[f"attn.qkv.{kind}"] = torch.cat([source[f"{name}.{kind}"] for name in _QKV])
        for name, ours in _COMPRESSOR.items():
            result[f"{ours}.{kind}"] = source[f"{name}.{kind}"]
    return result


def vit_merger_state_dict(
    state_dict: StateDict, *, prefix: str = "vit_merger."
) -> dict[str, torch.Tensor]:
    """Convert the state dict of an EarlyCompressor to the names of a ``vit_merger``.

    An MLP in the block or tied form becomes a dense one that computes the same
    (:func:`uhd_ops.nn.mlp_forms.convert_mlp`).

    Args:
        state_dict: Of an EarlyCompressor with attention, biases and windows of 2 x 2, and without
            what a ``vit_merger`` has no place for: LayerScale, or norms of queries and keys.
        prefix: In front of every name returned; ``"vit_merger."`` for the tower,
            ``"model.vision_tower.vit_merger."`` for ``MiniCPMV4_6ForConditionalGeneration``, ``""``
            for the module alone.

    Returns:
        The tensors under their new names. The parts of ``attn.qkv`` are copies; all others are the
        same tensors if the MLP was dense.

    Raises:
        TypeError: ``state_dict`` is not a mapping.
        ValueError: Keys are missing or have no place in a ``vit_merger``, or shapes do not fit.
    """
    ours = ("attn.qkv", *_COMPRESSOR.values())
    source = _take(state_dict, "", {f"{name}.{kind}" for name in ours for kind in _KINDS})
    channels = source["attn.norm.weight"].shape[0]
    for name, rows in (("attn.qkv.weight", 3 * channels), ("mlp.norm.weight", 4 * channels)):
        if source[name].shape[0] != rows:
            raise ValueError(
                f"{name} must have {rows} rows for C = {channels} in a vit_merger, whose windows "
                f"are 2 x 2, got shape {tuple(source[name].shape)}"
            )
    mlp = MlpWeights(*(source[name] for name in _MLP))
    mlp = convert_mlp(mlp, "dense", factor=2, channels=channels)
    source.update(zip(_MLP, mlp, strict=True))
    result = {}
    for kind in _KINDS:
        for name, part in zip(_QKV, source[f"attn.qkv.{kind}"].chunk(3), strict=True):
            result[f"{prefix}{name}.{kind}"] = part.clone()
        for name, our in _COMPRESSOR.items():
            result[f"{prefix}{name}.{kind}"] = source[f"{our}.{kind}"]
    return result


def connector_state_dict(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """Convert the ``merger`` of a checkpoint to the state dict of a PixelUnshuffleConnector.

    It loads, with ``strict=True``, into ``PixelUnshuffleConnector(hidden_size, text_hidden_size,
    merger_times=merger_times)``; the weights are the same in 4x and 16x mode.

    Args:
        state_dict: Of the module or of a whole model; other keys are left out.

    Returns:
        The same tensors under PixelUnshuffleConnector's names.

    Raises:
        TypeError: ``state_dict`` is not a mapping.
        ValueError: Keys are missing, unknown, or found under several prefixes.

    Example:
        >>> from uhd_ops.nn import PixelUnshuffleConnector
        >>> connector = PixelUnshuffleConnector(dim=8, out_dim=16)
        >>> released = merger_state_dict(connector.state_dict(), prefix="model.merger.")
        >>> connector.load_state_dict(connector_state_dict(released))
        <All keys matched successfully>
    """
    prefix = _prefix(state_dict, "merger.", "mlp.0.pre_norm.weight")
    return _rename_stages(state_dict, prefix, "mlp", _STAGE, "", "stages")


def merger_state_dict(state_dict: StateDict, *, prefix: str = "merger.") -> dict[str, torch.Tensor]:
    """Convert the state dict of a PixelUnshuffleConnector to the names of a ``merger``.

    Args:
        state_dict: Of a PixelUnshuffleConnector with windows of 2 x 2.
        prefix: In front of every name returned; ``"merger."`` for ``MiniCPMV4_6Model``,
            ``"model.merger."`` for ``MiniCPMV4_6ForConditionalGeneration``, ``""`` for the module.

    Returns:
        The same tensors under their new names.

    Raises:
        TypeError: ``state_dict`` is not a mapping.
        ValueError: Keys are missing or unknown.

    Example:
        >>> from uhd_ops.nn import PixelUnshuffleConnector
        >>> sorted(merger_state_dict(PixelUnshuffleConnector(8, 16).state_dict()))[:2]
        ['merger.mlp.0.linear_1.bias', 'merger.mlp.0.linear_1.weight']
    """
    back = {ours: name for name, ours in _STAGE.items()}
    return _rename_stages(state_dict, "", "stages", back, prefix, "mlp")


def _rename_stages(
    state_dict: StateDict,
    prefix: str,
    stages: str,
    names: Mapping[str, str],
    new_prefix: str,
    new_stages: str,
) -> dict[str, torch.Tensor]:
    _check_mapping(state_dict)
    found = re.compile(re.escape(f"{prefix}{stages}.") + r"(\d+)\.")
    count = len({match[1] for key in state_dict if (match := found.match(key))})
    suffixes = [f"{name}.{kind}" for name in names for kind in _KINDS]
    expected = {f"{stages}.{i}.{suffix}" for i in range(max(count, 1)) for suffix in suffixes}
    source = _take(state_dict, prefix, expected)
    return {
        f"{new_prefix}{new_stages}.{i}.{ours}.{kind}": source[f"{stages}.{i}.{name}.{kind}"]
        for i in range(count)
        for name, ours in names.items()
        for kind in _KINDS
    }


def _prefix(state_dict: StateDict, module: str, key: str) -> str:
    """What stands in front of the module's keys: nothing, or a path that ends in its name."""
    _check_mapping(state_dict)
    found = [name.removesuffix(key) for name in state_dict if name.endswith(key)]
    found = [name for name in found if name == "" or f".{name}".endswith(f".{module}")]
    if len(found) != 1:
        shown = ", ".join(map(repr, sorted(found))) or "none"
        raise ValueError(
            f'state_dict must hold the key "{key}" once, alone or behind "{module}", got prefixes: '
            f"{shown}"
        )
    return found[0]


def _take(state_dict: StateDict, prefix: str, names: set[str]) -> dict[str, torch.Tensor]:
    """Return what is behind ``prefix``, which must be exactly ``names``."""
    _check_mapping(state_dict)
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    for problem, keys in (("lacks", names - found.keys()), ("has", found.keys() - names)):
        if keys:
            reason = "" if problem == "lacks" else ", for which there is no place"
            raise ValueError(f"state_dict {problem} {', '.join(sorted(keys))}{reason}")
    return found


def _check_mapping(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
