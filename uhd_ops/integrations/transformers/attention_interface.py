# SPDX-License-Identifier: Apache-2.0
"""View attention under a name in transformers' attention interface."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from uhd_ops.ops.view_attention import attend_by_length

NAME = "uhd_ops"
# Options of other models' attention, which change the result; each must be absent or None.
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "block_indices")


def register_attention() -> str:
    """Make ``attn_implementation="uhd_ops"`` known to transformers.

    The function registered is attention without a mask: over each sequence of a batch, or, where
    the model passes ``cu_seq_lens_q``, inside each segment of packed tokens. Segments of one length
    share one call of torch's ``scaled_dot_product_attention``. Anything else is refused with a
    NotImplementedError: padding masks, causal or sliding-window attention, dropout, caches.

    Packed towers of transformers pass ``cu_seq_lens_q`` to flash attention only; to any other
    implementation they pass one view at a time, which gives the same result without the gain.
    :func:`accelerate` goes further for the models that it knows.

    Returns:
        The name, ``"uhd_ops"``.

    Raises:
        ImportError: transformers is not installed, or too old to have the interface.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> config = SiglipVisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        ...     image_size=32, patch_size=8, attn_implementation=register_attention(),
        ... )
        >>> SiglipVisionModel(config)(torch.randn(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 16, 32])
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers 5 or newer: pip install 'uhd_ops[transformers]'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    # Without this, transformers would drop a padding mask in silence. sdpa_mask makes none where
    # none is needed, and attention_forward refuses what it makes.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do.

    Args:
        module: The attention module that calls.
        query: ``(B, H, L, D)``.
        key: ``(B, H_kv, L, D)`` with H_kv a divisor of H.
        value: Like ``key``.
        attention_mask: Must be None.
        dropout: Must be 0.
        scaling: Factor on the scores; None means ``D ** -0.5``.
        is_causal: Must be False; None means ``module.is_causal``.
        cu_seq_lens_q: Where each segment starts, and the end, ``(S + 1,)``; None means one segment.
        cu_seq_lens_k: The same.
        **kwargs: Options that do not change the result; ``sliding_window`` and its like are refused
            unless they are None.

    Returns:
        ``(B, L, H, D)``, and None for the attention weights.

    Raises:
        NotImplementedError: An option has a value that is not supported.
        ValueError: The segments do not add up to L tokens.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(attention_mask=attention_mask, dropout=dropout or None, is_causal=causal or None)
    _refuse(**{name: kwargs.get(name) for name in _UNKNOWN})
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"query and key must have the same length, got {query.shape[2]} and {key.shape[2]}"
        )
    batch, heads, tokens, _ = query.shape
    lengths = _lengths(cu_seq_lens_q, cu_seq_lens_k, tokens)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = attend_by_length(*packed, lengths * batch, scaling)
    return out.unflatten(0, (batch, tokens)), None


def _lengths(
    cu_seq_lens_q: torch.Tensor | None, cu_seq_lens_k: torch.Tensor | None, tokens: int
) -> list[int]:
    """Tokens of each segment."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return [tokens]
    starts, starts_k = (None if x is None else x.tolist() for x in (cu_seq_lens_q, cu_seq_lens_k))
    if starts != starts_k:
        raise NotImplementedError(
            "cu_seq_lens_q and cu_seq_lens_k must be the same, as in self-attention"
        )
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if not starts or starts[0] != 0 or starts[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seq_lens_q must ascend from 0 to the {tokens} tokens of query, got {starts}"
        )
    return lengths


def _refuse(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            shown = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise NotImplementedError(
                f'attn_implementation="{NAME}" supports no {name}, got {shown}; set another '
                "implementation for this part of the model"
            )
