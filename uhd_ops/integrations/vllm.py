# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 and 4.7 in vLLM on our operators: a plugin.

vLLM calls :func:`register`, an entry point of its group ``vllm.general_plugins``, in each of its
processes where this package is installed (``VLLM_PLUGINS`` restricts it). It then serves these
models by subclasses of its own classes, in which the compressor inside the tower and the connector
run all views at once, and once for each view no longer. Odd grids, which vLLM's classes refuse, are
merged too.

Nothing here imports vLLM before vLLM asks for a model.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.mlp_forms import merge_windows
from uhd_ops.nn.modules import Mixed, mixed
from uhd_ops.ops.window_attention import window_attention_qkvpacked
from uhd_ops.padded_grids import PaddedGrids

WINDOW = 2
# Architecture in config.json -> vLLM's module that has a class of this name.
MODELS = {
    "MiniCPMV4_6ForConditionalGeneration": "vllm.model_executor.models.minicpmv4_6",
    "MiniCPMV4_7ForConditionalGeneration": "vllm.model_executor.models.minicpmv4_7",
}


def register() -> None:
    """Let vLLM make the models of ``MODELS`` by the classes of this module.

    Safe to call several times. vLLM imports this module again when it makes a model, and takes the
    class from it by name.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm import ModelRegistry

    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    if name in MODELS:
        return _served(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _served(name: str) -> type[nn.Module]:
    """The class of vLLM for a model, whose instances are accelerated."""
    base = getattr(importlib.import_module(MODELS[name]), name)
    return type(name, (_Served, base), {"__module__": __name__, "__doc__": base.__doc__})


class _Served:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        accelerate(self)


def accelerate(model: nn.Module) -> nn.Module:
    """Run the compressor and the connector of one of vLLM's models on our operators, in place.

    Parameters and their names stay, so vLLM loads weights as before.

    Args:
        model: A model of vLLM with ``MiniCPMV4_6ViTWindowAttentionMerger`` and
            ``MiniCPMV4_6Merger`` in it, or one of these.

    Returns:
        ``model`` itself.

    Raises:
        NotImplementedError: The model holds neither, or their windows are not 2 x 2.
    """
    parts = [(module, _part_of(module)) for module in model.modules()]
    parts = [(module, part) for module, part in parts if part is not None]
    if not parts:
        raise NotImplementedError(
            f"model must hold {' or '.join(PARTS)}, got {type(model).__qualname__}"
        )
    found = [(module, part) for module, part in parts if not isinstance(module, part)]
    for module, part in found:
        sides = tuple(getattr(module, part.sides))
        if sides != (WINDOW, WINDOW):
            raise NotImplementedError(
                f"{part.sides} must be {(WINDOW, WINDOW)}, which is what the rest of the model is "
                f"made for, got {sides}"
            )
    for module, part in found:
        module.__class__ = mixed(part, type(module))
    return model


def _part_of(module: nn.Module) -> type[WindowAttentionMerger] | type[Merger] | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((PARTS[name] for name in names if name in PARTS), None)


class WindowAttentionMerger(Mixed):
    """``MiniCPMV4_6ViTWindowAttentionMerger``: the compressor inside the tower."""

    sides = "window_kernel_size"

    def forward(
        self,
        hidden_states: torch.Tensor,
        tgt_sizes: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As in vLLM's class: merge a batch that is padded to its longest view.

        Args:
            hidden_states: ``(B, L, C)``.
            tgt_sizes: Grids of the views, ``(B, 2)``.
            attention_mask: Anything but None if the result needs one.

        Returns:
            Merged tokens ``(B, L', C)`` with zeros after each view, their grids ``(B, 2)``, and a
            mask ``(B, 1, 1, L')`` to add to scores.
        """
        grids = PackedGrids(tgt_sizes.tolist())
        coarse = grids.merged(WINDOW)
        tokens = self.merge(_pack(hidden_states, grids), grids)
        lengths = [height * width for height, width in coarse]
        tokens = pad_sequence(tokens.split(lengths), batch_first=True)
        sizes = (tgt_sizes + (WINDOW - 1)) // WINDOW
        if attention_mask is None:
            return tokens, sizes, None
        ends = sizes.prod(1, keepdim=True)
        beyond = torch.arange(tokens.shape[1], device=tokens.device) >= ends
        mask = torch.zeros_like(beyond, dtype=tokens.dtype)
        mask = mask.masked_fill(beyond, torch.finfo(tokens.dtype).min)
        return tokens, sizes, mask[:, None, None]

    def merge(self, x: torch.Tensor, grids: PackedGrids | PaddedGrids) -> torch.Tensor:
        """Merge packed tokens ``(N, C)`` to ``(M, C)``, without waiting for the device.

        With :class:`uhd_ops.PaddedGrids` the call can be captured in a CUDA graph, which then
        serves every batch that fits.
        """
        attention = self.self_attn
        qkv, _ = attention.qkv_proj(self.layer_norm1(x))
        qkv = qkv.unflatten(1, (3, -1, attention.head_dim))
        attended, _ = attention.out_proj(window_attention_qkvpacked(qkv, grids, WINDOW).flatten(1))
        return _merge(self, x + attended, grids, "gelu_tanh", residual=True)


class Merger(Mixed):
    """``MiniCPMV4_6Merger``: the connector."""

    sides = "merge_kernel_size"

    def forward(self, hidden_states: torch.Tensor, tgt_sizes: torch.Tensor) -> list[torch.Tensor]:
        """As in vLLM's class: ``(B, L, C)`` with grids ``(B, 2)`` to ``(M_i, D)`` of each view."""
        grids = PackedGrids(tgt_sizes.tolist())
        tokens = self.merge(_pack(hidden_states, grids), grids)
        for _ in self.mlp:
            grids = grids.merged(WINDOW)
        return list(tokens.split([height * width for height, width in grids]))

    def merge(self, x: torch.Tensor, grids: PackedGrids | PaddedGrids) -> torch.Tensor:
        """Merge packed tokens ``(N, C)`` to ``(M, D)``, without waiting for the device."""
        for mlp in self.mlp:
            x = _merge(mlp, x, grids, "gelu", residual=False)
            grids = grids.merged(WINDOW)
        return x


def _merge(
    module: nn.Module,
    x: torch.Tensor,
    grids: PackedGrids | PaddedGrids,
    activation: str,
    *,
    residual: bool,
) -> torch.Tensor:
    return merge_windows(
        x,
        grids,
        module.pre_norm,
        module.linear_1,
        module.linear_2,
        window=WINDOW,
        activation=activation,
        residual=residual,
    )


def _pack(padded: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
    """``(B, L, C)`` to ``(N, C)``, without what is after each view."""
    return torch.cat(
        [x[: height * width] for x, (height, width) in zip(padded, grids, strict=True)]
    )


PARTS: dict[str, type[WindowAttentionMerger] | type[Merger]] = {
    "vllm.model_executor.models.minicpmv4_6.MiniCPMV4_6ViTWindowAttentionMerger": (
        WindowAttentionMerger
    ),
    "vllm.model_executor.models.minicpmv4_6.MiniCPMV4_6Merger": Merger,
}
