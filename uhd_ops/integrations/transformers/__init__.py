# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face transformers on our operators; their weights in our modules."""

from uhd_ops.integrations.transformers.attention_interface import register_attention
from uhd_ops.integrations.transformers.checkpoints import (
    compressor_state_dict,
    connector_state_dict,
    merger_state_dict,
    vit_merger_state_dict,
)
from uhd_ops.integrations.transformers.llava_uhd import moonvit_from_llava_uhd
from uhd_ops.integrations.transformers.minicpmv import accelerate, restore
from uhd_ops.integrations.transformers.pretrained import from_pretrained
from uhd_ops.integrations.transformers.vlm import compress, decompress

__all__ = [
    "accelerate",
    "compress",
    "compressor_state_dict",
    "connector_state_dict",
    "decompress",
    "from_pretrained",
    "merger_state_dict",
    "moonvit_from_llava_uhd",
    "register_attention",
    "restore",
    "vit_merger_state_dict",
]
