# SPDX-License-Identifier: Apache-2.0
"""Training in the stages of the papers: what is frozen, and learning rates of what is not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from uhd_ops._checks import check_int
from uhd_ops.nn.early_compressor import EarlyCompressor, check_choice
from uhd_ops.nn.modules import Model
from uhd_ops.nn.window_token_compressor import WindowTokenCompressor

Part: TypeAlias = Literal["compressor", "tower", "connector", "llm"]
Recipe: TypeAlias = Literal["v4", "v4-onevision", "v4-code", "v3-code"]
Where: TypeAlias = str | nn.Module | Sequence[str | nn.Module]

PARTS: tuple[Part, ...] = get_args(Part)


def _all(rate: float, **others: float) -> dict[Part, float]:
    return dict.fromkeys(PARTS, rate) | others


# Learning rates of the parts that train; the others are frozen. docs/training.md says where each
# row is from, and with it the rates that they decay to.
_ALIGNMENT = {"compressor": 1e-4, "connector": 1e-4}
_V3 = {"compressor": 1e-5, "tower": 1e-5}
RECIPES: dict[Recipe, dict[int, dict[Part, float]]] = {
    "v4": {1: _ALIGNMENT, 2: {"compressor": 1e-5, "tower": 1e-5}, 3: _all(5e-5), 4: _all(1e-5)},
    "v4-onevision": {1: _ALIGNMENT, 2: _all(1e-5), 3: _all(5e-5), 4: _all(1e-5)},
    "v4-code": {1: _ALIGNMENT, 2: _all(2e-6, llm=1e-5), 3: _all(1e-5, llm=5e-5), 4: _all(1e-5)},
    "v3-code": {
        1: {**_V3, "connector": 2e-4},
        2: {**_V3, "connector": 2e-5, "llm": 2e-5},
        3: {**_V3, "connector": 2e-5, "llm": 2e-5},
    },
}


def freeze_for_stage(
    model: Model,
    stage: Literal[1, 2, 3, 4],
    *,
    recipe: Recipe = "v4",
    compressor: Where | None = None,
    tower: Where | None = None,
    connector: Where | None = None,
    llm: Where | None = None,
) -> Model:
    """Choose what trains in a stage by ``requires_grad``, in place.

    Of a tower alone, stage 1 trains the compressors and nothing else, so that what is new adapts to
    the trained model before it can disturb it, and every later stage trains all of it. What stands
    outside is the caller's to freeze then, and so is a head of the tower that should train in stage
    1: ``vit.head.requires_grad_(True)``. Of a whole model, whose parts are named, these train:

    ================  ===========================  ======================  =========  =========
    recipe            stage 1                      stage 2                 stage 3    stage 4
    ================  ===========================  ======================  =========  =========
    ``v4``            compressor, connector        compressor, tower       all        all
    ``v4-onevision``  compressor, connector        all                     all        all
    ``v4-code``       compressor, connector        all                     all        all
    ``v3-code``       compressor, tower,           all                     all        --
                      connector
    ================  ===========================  ======================  =========  =========

    Only floating-point parameters are touched. Gradients that are there already stay: call
    ``optimizer.zero_grad()``, or a parameter frozen now still takes a step with its old gradient.
    Before DistributedDataParallel, whose reducer knows the parameters that trained when it was
    made; before or after FSDP2's ``fully_shard``.

    Args:
        model: A tower with a compressor, a module that contains one, or a whole model.
        stage: 1 to 4, or to 3 for ``v3-code``.
        recipe: ``"v4"`` is LLaVA-UHD v4 on its own data, ``"v4-onevision"`` on that of
            LLaVA-OneVision, ``"v4-code"`` and ``"v3-code"`` are what the released scripts do.
        compressor: Where the compressors are: a name in ``model``, of a module or a parameter, a
            module of ``model``, or several of these. None for every EarlyCompressor and
            WindowTokenCompressor in the tower.
        tower: Where the vision tower is, likewise. None where ``model`` is all tower.
        connector: Where that is which maps visual tokens to the language model.
        llm: Where the language model is, with its head: ``("model.language_model", "lm_head")``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, ``stage`` not an int, or a part neither a name nor a
            module.
        ValueError: The recipe has no such stage, a part is not in ``model``, a parameter is in two
            parts or, where any but the compressor is named, in none, or ``model`` is a tower
            without a compressor. After an error, nothing is changed.

    Source:
        LLaVA-UHD v4 (arXiv 2605.08985): section 4.1 for stages 1 and 2 ("updating only the
        projector and D", the compressor; "only ViT unfrozen"), tables A7 and A8 for the others.
        These tables have "ViT / Connector" for stage 1, where we follow the text and the released
        scripts. Whether the compressor trains in stage 2 of table A7 no paper says: we count it
        as part of the ViT that it stands in. docs/training.md has more, and the scripts.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = uhd_ops.freeze_for_stage(uhd_ops.insert_early_compressor(vit, layer=0), 1)
        >>> {name.split(".")[2] for name, p in vit.named_parameters() if p.requires_grad}
        {'compressor'}
    """
    rates = _rates(recipe, stage)
    of_part = _split(model, compressor=compressor, tower=tower, connector=connector, llm=llm)
    changes = [
        (name, parameter, part in rates)
        for part, parameters in of_part.items()
        for name, parameter in parameters
    ]
    for name, parameter, trains in changes:
        if trains and parameter.is_inference():
            raise ValueError(
                f"the parameters of model must be able to train, got {name}, made in inference mode"
            )
    for _, parameter, trains in changes:
        parameter.requires_grad_(trains)
    return model


def param_groups(
    model: nn.Module,
    stage: Literal[1, 2, 3, 4],
    *,
    recipe: Recipe = "v4",
    rates: Mapping[Part, float | None] | None = None,
    no_decay: bool = False,
    compressor: Where | None = None,
    tower: Where | None = None,
    connector: Where | None = None,
    llm: Where | None = None,
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: each part that trains, at its learning rate.

    Call :func:`freeze_for_stage` first, with the same stage, recipe and parts; and both before
    DistributedDataParallel, but this one after FSDP2's ``fully_shard``, which makes new parameters.
    Each parameter that requires a gradient is in one group, tied ones once. Nothing is changed.

    Args:
        model: As in :func:`freeze_for_stage`.
        stage: The stage whose learning rates are taken.
        recipe: Where they are from.
        rates: Learning rates of parts instead of the recipe's; None for a part that does not train.
        no_decay: Whether norms, biases and every other parameter of at most one dimension are
            groups of their own, with a weight decay of 0.
        compressor: As in :func:`freeze_for_stage`.
        tower: Likewise.
        connector: Likewise.
        llm: Likewise.

    Returns:
        A dict for each group, with ``name``, the part and ``".no_decay"`` behind it for those
        without a weight decay; ``params``; ``lr``; and ``weight_decay`` for the latter. The others
        take that of the optimizer.

    Raises:
        TypeError: As in :func:`freeze_for_stage`, or ``rates`` is not a mapping of numbers.
        ValueError: As there; or a part has trainable parameters but no learning rate in this stage,
            or a learning rate but no trainable parameters; or a rate is not positive.

    Source:
        Learning rates: LLaVA-UHD v4, tables A7 and A8; the released scripts of v4 and v3. The
        papers say nothing of weight decay. The script of v4 has AdamW with betas (0.9, 0.98) and
        0.01, none for what has "bias" in its name; those of v3 have 0. See docs/training.md.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = uhd_ops.freeze_for_stage(uhd_ops.insert_early_compressor(vit, layer=0), 2)
        >>> groups = param_groups(vit, 2, rates={"compressor": 1e-4})
        >>> [(group["name"], group["lr"]) for group in groups]
        [('compressor', 0.0001), ('tower', 1e-05)]
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    """
    chosen = _with_changes(_rates(recipe, stage), rates)
    of_part = _split(model, compressor=compressor, tower=tower, connector=connector, llm=llm)
    groups: list[dict[str, Any]] = []
    for part, parameters in of_part.items():
        trainable = [(name, p) for name, p in parameters if p.requires_grad]
        if not parameters or (not trainable and part not in chosen):
            continue
        if part not in chosen:
            raise ValueError(
                f"rates must have one for each part that trains, but stage {stage} of {recipe!r} "
                f"has none for the {part}, and {trainable[0][0]} requires a gradient; call "
                f"freeze_for_stage(model, {stage}) first, or give rates={{{part!r}: ...}}"
            )
        if not trainable:
            raise ValueError(
                f"model must train what has a learning rate in stage {stage} of {recipe!r}, but no "
                f"parameter of the {part} requires a gradient; call freeze_for_stage(model, "
                f"{stage}) first, or give rates={{{part!r}: None}}"
            )
        plain = [p for name, p in trainable if not (no_decay and _is_vector(name, p))]
        bare = [p for name, p in trainable if no_decay and _is_vector(name, p)]
        if plain:
            groups.append({"name": part, "params": plain, "lr": chosen[part]})
        if bare:
            name = f"{part}.no_decay"
            groups.append({"name": name, "params": bare, "lr": chosen[part], "weight_decay": 0.0})
    return groups


def _rates(recipe: object, stage: object) -> dict[Part, float]:
    check_choice("recipe", recipe, tuple(RECIPES))
    stages = RECIPES[recipe]
    if check_int(stage, "stage") not in stages:
        raise ValueError(f"stage must be 1 to {max(stages)} for recipe {recipe!r}, got {stage}")
    return stages[stage]


def _with_changes(rates: dict[Part, float], changes: object) -> dict[Part, float]:
    if changes is None:
        return rates
    if not isinstance(changes, Mapping):
        raise TypeError(f"rates must be a mapping, got {type(changes).__name__}")
    rates = dict(rates)
    for part, rate in changes.items():
        check_choice("a part in rates", part, PARTS)
        if rate is None:
            rates.pop(part, None)
            continue
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"rates[{part!r}] must be a number or None, got {type(rate).__name__}")
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"rates[{part!r}] must be positive and finite, got {rate}")
        rates[part] = float(rate)
    return rates


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"


Named: TypeAlias = tuple[str, nn.Parameter]


def _split(model: object, **where: Where | None) -> dict[Part, list[Named]]:
    """The floating-point parameters of each part, each in one, with their first names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    names = {id(p): name for name, p in named}
    whole = any(where[part] is not None for part in PARTS if part != "compressor")
    part_of: dict[int, Part] = {} if whole else dict.fromkeys(names, "tower")
    for part in ("tower", "connector", "llm", "compressor"):
        may_hold = (None, "tower") if part == "compressor" else (None,)
        for key in _found(model, part, where[part]):
            if part_of.get(key) not in (*may_hold, part):
                other = part_of[key]
                raise ValueError(f"{names[key]} must be in one part, got {other} and {part}")
            part_of[key] = part
    if where["compressor"] is None:
        kinds = EarlyCompressor, WindowTokenCompressor
        found = [module for module in model.modules() if isinstance(module, kinds)]
        if not found and not whole:
            raise ValueError(
                f"model must hold a compressor, got a {type(model).__name__} without one; call "
                "insert_early_compressor(model) first"
            )
        keys = {id(p) for module in found for p in module.parameters()}
        part_of |= {key: "compressor" for key in keys if part_of.get(key) == "tower"}
    missing = [name for key, name in names.items() if key not in part_of]
    if missing:
        raise ValueError(
            "every parameter of model must be in one of its parts, got "
            f"{len(missing)} in none of those named, {missing[0]} among them"
        )
    return {part: [(name, p) for name, p in named if part_of[id(p)] == part] for part in PARTS}


def _found(model: nn.Module, part: str, where: object) -> set[int]:
    """The ids of the parameters that the argument ``part`` of a public function stands for."""
    if where is None:
        return set()
    found = list[nn.Parameter]()
    several = isinstance(where, Sequence) and not isinstance(where, str | nn.Module)
    for one in where if several else (where,):
        if isinstance(one, str):
            named = model.named_parameters(remove_duplicate=False)
            held = [p for name, p in named if name == one or name.startswith(f"{one}.")]
            if not held and one not in dict(model.named_modules()):
                raise ValueError(
                    f"{part} must name modules or parameters of model, got {one!r}, which a "
                    f"{type(model).__name__} does not have"
                )
            found += held
        elif isinstance(one, nn.Module):
            if not any(module is one for module in model.modules()):
                raise ValueError(
                    f"{part} must be in model, got a {type(one).__name__} that it does not hold"
                )
            found += one.parameters()
        else:
            raise TypeError(
                f"{part} must be a name, a module or several of these, got {type(one).__name__}"
            )
    return {id(p) for p in found if p.is_floating_point()}
