# SPDX-License-Identifier: Apache-2.0
"""The released vision towers of LLaVA-UHD v3, which are MoonViT with several merges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from uhd_ops._checks import check_positive_int
from uhd_ops.retrofit.insertion import insert_progressive_compression

if TYPE_CHECKING:
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

_PATCHES = "patch_embed.proj.weight"
# Names of a released tower, and those of transformers with our compressor.
_NAMES = {
    r"patch_embed\.proj": "patch_embed.proj",
    r"patch_embed\.pos_emb\.weight": "patch_embed.pos_emb.position_embeddings",
    r"encoder\.final_layernorm": "final_layernorm",
    r"encoder\.blocks\.(\d+)\.norm0": r"layers.\1.norm1",
    r"encoder\.blocks\.(\d+)\.norm1": r"layers.\1.norm2",
    r"encoder\.blocks\.(\d+)\.wqkv": r"layers.\1.attn.qkv",  # divided below
    r"encoder\.blocks\.(\d+)\.wo": r"layers.\1.attn.proj",
    r"encoder\.blocks\.(\d+)\.mlp\.fc0": r"layers.\1.mlp.fc1",
    r"encoder\.blocks\.(\d+)\.mlp\.fc1": r"layers.\1.mlp.fc2",
    r"encoder\.blocks\.(\d+)\.merger\.attn_layer\.0": r"layers.\1.compressor.fc1",
    r"encoder\.blocks\.(\d+)\.merger\.attn_layer\.2": r"layers.\1.compressor.fc2",
}
_UNUSED = r"encoder\.blocks\.\d+\.merger\.zero_init_fc\.weight"


def moonvit_from_llava_uhd(
    state_dict: Mapping[str, torch.Tensor], *, num_heads: int = 16
) -> Kimi_K25VisionModel:
    """Make a MoonViT with the weights of a released tower of LLaVA-UHD v3, merges included.

    The result computes what the released tower does, up to rounding, for images whose sides divide
    into whole windows: ``last_hidden_state`` holds its tokens, at the positions that it gives them
    (``positions="reindex"``). Sizes, the layers with merges and their kind come from the names and
    shapes of the weights; merges without weights of their own are the mean of a window.

    Args:
        state_dict: The tensors of the tower by their released names, such as
            ``encoder.blocks.0.wqkv.weight``, or of a whole model that holds it: what is outside of
            the tower is ignored.
        num_heads: Attention heads, which no shape tells. The released towers have 16.

    Returns:
        A ``Kimi_K25VisionModel`` of transformers in evaluation, in the dtype and on the device of
        the patch embedding, which shares no memory with ``state_dict``. Its own merger is off:
        ``merge_kernel_size`` is (1, 1). Where the tower has merges, it is what
        :func:`uhd_ops.insert_progressive_compression` makes.

    Raises:
        TypeError: ``state_dict`` is not a mapping, or ``num_heads`` not an int.
        ValueError: ``state_dict`` holds no such tower, or more than one, a name in it is not known,
            one is missing, its table of positions is not square, or ``num_heads`` does not divide
            its channels into multiples of four.

    Source:
        LLaVA-UHD v3 (ViT-UHD), progressive visual compression.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    num_heads = check_positive_int(num_heads, "num_heads")
    weights = _tower(state_dict)
    kernel = weights[_PATCHES]
    channels = kernel.shape[0]
    if channels % (4 * num_heads):
        raise ValueError(
            f"num_heads must divide the {channels} channels of state_dict into heads of a multiple "
            f"of 4 channels, got {num_heads}"
        )
    converted, merges = _converted(weights, num_heads)
    model = _made(converted, merges, num_heads).to(kernel.device, kernel.dtype)
    expected = model.state_dict()
    wrong = [
        name
        for name in sorted(expected.keys() | converted.keys())
        if name not in expected
        or name not in converted
        or expected[name].shape != converted[name].shape
    ]
    if wrong:
        shapes = [
            tuple(tensors[wrong[0]].shape) if wrong[0] in tensors else None
            for tensors in (expected, converted)
        ]
        raise ValueError(
            f"state_dict must hold a whole tower, but {len(wrong)} of its tensors, by their names "
            f"in transformers, differ: {wrong[0]} must have shape {shapes[0]}, got {shapes[1]}"
        )
    model.load_state_dict(converted)
    return model.eval()


def _tower(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the only tower, by their names inside of it."""
    position = "patch_embed.pos_emb.weight"
    found = [name.removesuffix(position) for name in state_dict if name.endswith(position)]
    found = [prefix for prefix in found if prefix + _PATCHES in state_dict]
    if len(found) != 1:
        raise ValueError(
            f"state_dict must hold one tower, with {_PATCHES} and {position}, got {len(found)}"
        )
    prefix = found[0]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith((prefix + "patch_embed.", prefix + "encoder."))
    }


def _converted(
    weights: Mapping[str, torch.Tensor], num_heads: int
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Tensors by their names in transformers, and the layers after which tokens are merged."""
    converted, merges = {}, set()
    for name, tensor in weights.items():
        if merge := re.match(r"encoder\.blocks\.(\d+)\.merger\.", name):
            merges.add(int(merge[1]))
        if re.fullmatch(_UNUSED, name):
            continue
        for pattern, new in _NAMES.items():
            if match := re.fullmatch(rf"{pattern}(\.weight|\.bias)?", name):
                converted[match.expand(new) + (match[match.re.groups] or "")] = tensor
                break
        else:
            raise ValueError(f"state_dict must hold names of a released MoonViT, got {name!r}")
    for name in [name for name in converted if ".attn.qkv." in name]:
        query, key, value = converted.pop(name).chunk(3)
        turned = (_halves(part, num_heads) for part in (query, key))
        for letter, part in zip("qkv", (*turned, value), strict=True):
            converted[name.replace("qkv", f"{letter}_proj")] = part
    return converted, sorted(merges)


def _halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows ``(H * D, ...)`` whose neighbours turn together, as those whose halves do.

    The released tower pairs channels 2 j and 2 j + 1 of a head, transformers j and j + D / 2.
    """
    pairs = rows.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _made(
    converted: Mapping[str, torch.Tensor], merges: list[int], num_heads: int
) -> Kimi_K25VisionModel:
    """A model of these sizes."""
    from transformers.models.kimi_k25 import modeling_kimi_k25  # not every version has it

    kernel = converted[_PATCHES]
    table = converted["patch_embed.pos_emb.position_embeddings"]
    if table.shape[0] != table.shape[1]:
        raise ValueError(
            "state_dict must hold a square table of positions, got "
            f"{' x '.join(str(side) for side in table.shape[:-1])}"
        )
    hidden = converted.get("layers.0.mlp.fc1.weight", kernel).shape[0]
    config = modeling_kimi_k25.Kimi_K25VisionConfig(
        hidden_size=kernel.shape[0],
        intermediate_size=hidden,
        num_attention_heads=num_heads,
        num_hidden_layers=len({name.split(".")[1] for name in converted if "layers." in name}),
        patch_size=kernel.shape[-1],
        pos_emb_height=table.shape[0],
        pos_emb_width=table.shape[1],
        merge_kernel_size=(1, 1),
    )
    model = modeling_kimi_k25.Kimi_K25VisionModel(config)
    if not merges:
        return model
    fc1 = converted.get(f"layers.{merges[0]}.compressor.fc1.weight")
    kind = {"pool": "mean"} if fc1 is None else {"pool": "adaptive", "hidden_dim": fc1.shape[0]}
    return insert_progressive_compression(model, merges, **kind, positions="reindex")
