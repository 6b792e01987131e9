# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V on our operators, and back."""

from __future__ import annotations

from torch import nn

from uhd_ops.integrations.transformers.minicpmv import PARTS, Accelerated, VisionModel
from uhd_ops.nn.modules import is_mixed, mixed


def accelerate(model: nn.Module) -> nn.Module:
    """Run the vision tower of MiniCPM-V 4.6 or 4.7 on our operators, in place.

    The compressor inside the tower, whose original calls attention once for each window, becomes
    :func:`uhd_ops.window_attention` and :func:`uhd_ops.pixel_unshuffle_mlp`; attention in the
    layers becomes :func:`uhd_ops.view_attention`, unless flash attention is configured, which stays
    (so does dropout of attention weights in training); the connector merges all views at once.

    Results are the same up to rounding. Parameters, their names, hooks, ``save_pretrained``,
    ``copy.deepcopy``, pickling, recorded outputs and gradient checkpointing are as before, and
    modules may be quantised or adapted afterwards. Only the classes of some modules change; their
    names do not. :func:`restore` undoes it.

    **Odd grids**, which the original refuses, are accepted: a ragged window attends among the
    tokens that it holds, the MLP repeats the nearest of them, and sides become ceil(side / 2). An
    image of ``(h, w)`` patches fills ``ceil(h / 4) * ceil(w / 4)`` tokens of the language model, or
    ``ceil(h / 2) * ceil(w / 2)`` in ``"4x"`` mode, with one stage of the connector. For grids with
    sides that are multiples of 4 (of 2 in ``"4x"`` mode), the only ones that the image processor of
    transformers makes, nothing changes. For others the caller writes the prompt: the processor
    counts ``h * w // 16`` placeholders (``h * w // 4``), and where that differs from the number
    above, the model raises the error that it always raises. The positions that 4.7 computes from
    ``target_sizes`` follow.

    Args:
        model: A model of transformers that contains such a tower: the tower itself
            (``MiniCPMV4_6VisionModel``), ``MiniCPMV4_6Model``, or
            ``MiniCPMV4_6ForConditionalGeneration``; the same of 4.7; or a module around them.

    Returns:
        ``model`` itself. What is accelerated already is left alone.

    Raises:
        NotImplementedError: There is no such tower in the model, its windows are not 2 x 2, or a
            subclass or an instance replaces a method that would be replaced. The model is as it
            was.
        TypeError: ``model`` is no module.

    Source:
        LLaVA-UHD v4, section 3.2, as released in MiniCPM-V 4.6.

    Example:
        >>> from transformers import MiniCPMV4_6VisionConfig
        >>> from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
        >>> config = MiniCPMV4_6VisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ...     insert_layer_id=0, image_size=64, patch_size=8,
        ... )
        >>> tower = accelerate(MiniCPMV4_6VisionModel(config))
        >>> sizes = torch.tensor([[4, 6], [3, 5]])
        >>> pixels = torch.randn(1, 3, 8, 8 * (4 * 6 + 3 * 5))
        >>> tower(pixels, target_sizes=sizes).last_hidden_state.shape
        torch.Size([1, 12, 32])
    """
    parts = [found for found in _parts_of(model) if not isinstance(found[1], Accelerated)]
    for name, module, part, base in parts:
        _check(name, module, part, base)
    for _, module, part, _ in parts:
        module.__class__ = mixed(part, type(module))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`, in place.

    Args:
        model: A model that :func:`accelerate` returned, or a part of one.

    Returns:
        ``model`` itself, with the classes that its modules had.

    Raises:
        NotImplementedError: Something extended the class of an accelerated module since. The model
            is as it was.
        TypeError: ``model`` is no module.
        ValueError: Nothing in the model is accelerated.
    """
    _check_module(model)
    modules = {n: module for n, module in model.named_modules() if isinstance(module, Accelerated)}
    if not modules:
        raise ValueError(
            f"model holds no module that accelerate() changed, got {type(model).__name__}"
        )
    for name, module in modules.items():
        if not is_mixed(type(module)):
            raise NotImplementedError(
                f"{name or 'model'} must have the class that accelerate() gave it, got "
                f"{type(module).__qualname__}: undo what extended it (sharding, say) first"
            )
    for module in modules.values():
        module.__class__ = module.body_class
    return model


def _parts_of(
    model: nn.Module,
) -> list[tuple[str, nn.Module, type[Accelerated], type[nn.Module]]]:
    """Find the modules to accelerate: name, module, our class, and the class that it extends."""
    _check_module(model)
    found = []
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            part = PARTS.get(f"{base.__module__}.{base.__qualname__}")
            if part is not None and not is_mixed(base):
                found.append((name or "model", module, part, base))
                break
    if not any(part is VisionModel for _, _, part, _ in found):
        towers = " or ".join(name for name, part in PARTS.items() if part is VisionModel)
        raise NotImplementedError(f"model must contain {towers}, got {type(model).__name__}")
    return found


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check(name: str, module: nn.Module, part: type[Accelerated], base: type[nn.Module]) -> None:
    """Refuse a module whose methods are not those that ``part`` was written for."""
    cls = type(module)
    for method in part.replaced:
        if method in vars(module) or getattr(cls, method) is not getattr(base, method):
            where = "the module itself" if method in vars(module) else cls.__qualname__
            raise NotImplementedError(
                f"{name} must leave {base.__qualname__}.{method} as it is, but {where} replaces "
                "it; accelerate the model before it is changed or dispatched to several devices"
            )
    part.check(module, name)
