# SPDX-License-Identifier: Apache-2.0
"""The encoder layers of CLIP, SigLIP and SigLIP 2 in transformers."""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.host_block import HostBlock
from uhd_ops.nn.hosts import _checks as checks
from uhd_ops.nn.hosts import body_class
from uhd_ops.nn.hosts import hf_parts as parts


def read(block: nn.Module) -> HostBlock:
    """Return the parts of an encoder layer: pre-norm, with separate projections."""
    checks.require_own_forward(block, "layer")
    cls = body_class(block)
    family = cls.__name__.removesuffix("EncoderLayer")
    attention = parts.attention(
        block.self_attn,
        "layer.self_attn",
        parts.sibling(cls, f"{family}Attention"),
        norm=parts.norm(block.layer_norm1, "layer.layer_norm1"),
    )
    mlp = parts.mlp(
        block.mlp,
        "layer.mlp",
        (parts.sibling(cls, f"{family}MLP"),),
        norm=parts.norm(block.layer_norm2, "layer.layer_norm2"),
    )
    host = HostBlock(block.layer_norm1.normalized_shape[0], (attention,), (mlp,))
    return checks.check_shapes(host, "layer")
