# SPDX-License-Identifier: Apache-2.0
"""Loading models of transformers that were saved with a compressor."""

from __future__ import annotations

from typing import Any

from torch import nn

# Importing it extends transformers' own save_pretrained and from_pretrained.
from uhd_ops.retrofit.families import _hf_checkpoints  # noqa: F401


def from_pretrained(model_class: type, *args: Any, **kwargs: Any) -> Any:
    """Load a model that was saved with a compressor.

    ``save_pretrained`` writes the options of every compressor in a model to ``config.json``, and
    its weights beside the others. Once this package is imported, ``from_pretrained`` of every class
    of transformers and of ``AutoModel`` builds the compressors again before it loads the weights,
    also those of a vision tower in a larger model, or in a ``TimmWrapperModel``. A process that has
    not imported it gets an error that says so. This function is ``model_class.from_pretrained``,
    but it refuses a checkpoint without a compressor.

    Args:
        model_class: Class of the model, such as ``SiglipVisionModel``, or ``AutoModel``.
        *args: As for ``model_class.from_pretrained``: path or name of the checkpoint first.
        **kwargs: Likewise; ``dtype``, ``device_map`` and ``quantization_config`` among them.

    Returns:
        What ``model_class.from_pretrained`` returns.

    Raises:
        TypeError: ``model_class`` is not a class of models.
        ValueError: The config describes no compressor, or the checkpoint lacks some of its weights.

    Example:
        >>> import tempfile
        >>> import uhd_ops
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> config = SiglipVisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ...     image_size=32, patch_size=8,
        ... )
        >>> model = uhd_ops.insert_early_compressor(SiglipVisionModel(config), layer=0)
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> model = from_pretrained(SiglipVisionModel, folder)
        >>> model.compression.layers
        (0,)
    """
    if not isinstance(model_class, type) or not hasattr(model_class, "from_pretrained"):
        raise TypeError(
            "model_class must be a class of models, such as transformers.SiglipVisionModel, got "
            f"{getattr(model_class, '__name__', repr(model_class))}"
        )
    result = model_class.from_pretrained(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if not any(hasattr(module, "compression") for module in modules):
        raise ValueError(
            "config must describe a compressor in the model or in one inside it, as "
            "save_pretrained writes it; for a checkpoint without one, there is "
            f"{model_class.__name__}.from_pretrained"
        )
    return result
