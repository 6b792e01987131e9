# SPDX-License-Identifier: Apache-2.0
"""How compressors are inserted into a model and removed, for any family.

The classes of the model and of its blocks change in place; no module is added to the list of
blocks, so every index and every parameter name stays. Why, and what else was considered:
docs/adr/0003.
"""

from __future__ import annotations

from torch import nn

from uhd_ops._reclass import Mixed, is_mixed, mixed
from uhd_ops.retrofit.blocks import CoarsePart, CompressedBlock
from uhd_ops.retrofit.config import Config
from uhd_ops.retrofit.model import CompressedWrapper, Family


def insert(vit: nn.Module, config: Config, family: Family) -> nn.Module:
    """Insert the compressors; everything that can fail comes before the first change."""
    transformer = family.transformer(vit)
    if isinstance(vit, CompressedWrapper):  # the compressor was removed from its transformer only
        restore_model(vit)
    blocks = transformer.get_submodule(family.model.blocks_name)
    config.check_depth(len(blocks))
    family.check(vit, config)
    compressors = {
        index: config.build(family.read(transformer, blocks[index])) for index in config.indices
    }
    changes: list[tuple[nn.Module, type[Mixed], int]] = [(transformer, family.model, 1)]
    if vit is not transformer:
        changes.append((vit, family.wrapper, 1))
    merged = 1  # side of the windows that became one token in front of a block
    for index, block in enumerate(blocks):
        if merged > 1:
            inner = dict(block.named_modules())
            changes += [
                (inner[name], mixin, merged)
                for name, mixin in family.parts.items()
                if name in inner
            ]
            changes += [(block, family.coarse, merged)] if family.coarse else []
        if index in compressors:
            changes.append((block, family.compressed, merged))
            merged *= config.window
    children = dict(transformer.named_children())
    changes += [
        (children[name], mixin, merged) for name, mixin in family.heads.items() if name in children
    ]
    for module, mixin, window in changes:
        module.__class__ = mixed(mixin, type(module))
        if issubclass(mixin, CoarsePart):
            module.window, module.positions = window, config.positions
        if issubclass(mixin, CompressedBlock):
            module.merged_before = window
    for index, compressor in compressors.items():
        blocks[index].compressor = compressor.train(blocks[index].training)
    for model in dict.fromkeys((transformer, vit)):
        _remember(model, config)
    return vit


def insert_again(vit: nn.Module, config: Config, family: Family) -> nn.Module:
    """Insert what the transformer holds already; a model that wraps it may not know of it yet."""
    if vit is not family.transformer(vit) and not isinstance(vit, CompressedWrapper):
        vit.__class__ = mixed(family.wrapper, type(vit))
        _remember(vit, config)
    return vit


def remove(vit: nn.Module, family: Family) -> nn.Module:
    """Undo :func:`insert`."""
    transformer = family.transformer(vit)
    models = [transformer, vit] if isinstance(vit, CompressedWrapper) else [transformer]
    blocks = transformer.get_submodule(transformer.blocks_name)
    inner = (*blocks.modules(), *transformer.children())
    changed = [module for module in inner if isinstance(module, Mixed)]
    for module in (*models, *changed):
        if not is_mixed(type(module)):
            raise NotImplementedError(
                "vit and its blocks must have the classes that the insertion gave them, got "
                f"{type(module).__name__}: undo what extended it (a parametrization, say) first"
            )
    for module in changed:
        if isinstance(module, CompressedBlock):
            del module.compressor
        for name in ("layout_while_tracing", "window", "positions", "merged_before"):
            vars(module).pop(name, None)
        while isinstance(module, Mixed):  # a block between two merges has two mixins
            module.__class__ = module.body_class
    for model in models:
        restore_model(model)
    return vit


def restore_model(model: nn.Module) -> None:
    """Undo what the insertion changed in the model itself; its blocks are another matter."""
    config = model.early_compressor
    for info in _merged_features(model, config):
        info["reduction"] //= config.window
    model._forget()
    model.__class__ = model.body_class


def _remember(model: nn.Module, config: Config) -> None:
    model._remember(config)
    for info in _merged_features(model, config):
        info["reduction"] *= config.window


def _merged_features(vit: nn.Module, config: Config) -> list[dict]:
    """The entries of ``feature_info`` behind each merge, once for every merge."""
    info = getattr(vit, "feature_info", [])
    # Gemma 4's classifier shows the list of its encoder, which is changed there.
    if info is getattr(getattr(vit, "encoder", None), "feature_info", None):
        return []
    return [entry for index in config.indices for entry in info[index:]]
