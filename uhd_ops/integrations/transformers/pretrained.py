# SPDX-License-Identifier: Apache-2.0
"""Loading models of transformers that were saved with a compressor."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def from_pretrained(model_class: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Load a model that was saved with a compressor.

    :func:`uhd_ops.insert_early_compressor` notes its options in the model's ``config``, so
    ``save_pretrained`` writes them to ``config.json``, and the compressor's weights beside the
    others. This function is ``model_class.from_pretrained``, except that every model inside, whose
    config tells of a compressor, gets it before the weights are loaded. They need not be on the
    outside: the vision tower of a ``LlavaForConditionalGeneration`` is found too.

    ``model_class.from_pretrained`` itself knows nothing of the compressor: it loads the rest, and
    reports the compressor's weights as unexpected.

    Args:
        model_class: Class of the model, such as ``SiglipVisionModel``; no ``AutoModel``.
        *args: As for ``model_class.from_pretrained``: path or name of the checkpoint first.
        **kwargs: Likewise; ``dtype``, ``device_map`` and ``quantization_config`` among them.

    Returns:
        What ``model_class.from_pretrained`` returns.

    Raises:
        TypeError: ``model_class`` is no class of models.
        ValueError: The config tells of no compressor, or the checkpoint has not all its weights.

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
    is_class = isinstance(model_class, type) and issubclass(model_class, nn.Module)
    if not is_class or not hasattr(model_class, "from_pretrained"):
        raise TypeError(
            "model_class must be a class of models, such as transformers.SiglipVisionModel, got "
            f"{getattr(model_class, '__name__', repr(model_class))}"
        )
    model_class = vars(model_class).get("body_class", model_class)  # that of a compressed model
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = _builder(model_class).from_pretrained(*args, output_loading_info=True, **kwargs)
    missing = sorted(key for key in info["missing_keys"] if ".compressor." in key)
    if missing:
        raise ValueError(
            "the checkpoint must hold all weights of the compressor that its config tells of; "
            f"missing are {', '.join(missing)}"
        )
    return (model, info) if wants_info else model


@functools.cache
def _builder(model_class: type[nn.Module]) -> type[nn.Module]:
    """Return a class whose call makes a model of ``model_class`` with its compressors."""

    def initialize(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        from uhd_ops.retrofit.families._hf_models import insert_configured

        model_class.__init__(self, config, *args, **kwargs)
        self.__class__ = model_class
        if not insert_configured(self):
            raise ValueError(
                "config must tell of a compressor in the model or in one inside it, as "
                "insert_early_compressor notes it in config.compression; for a checkpoint without "
                f"one, there is {model_class.__name__}.from_pretrained"
            )

    # The names are those that transformers looks up, for instance for what to record.
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {"__init__": initialize, **names})
