# SPDX-License-Identifier: Apache-2.0
"""How torch's DTensor may shard the operators, so that they run under tensor parallelism.

Each operator declares its rules beside its registration. They reach DTensor's propagator when the
first DTensor does: importing torch.distributed.tensor takes longer than importing this package.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

Placed: TypeAlias = "int | Literal['sum'] | None"
Rule: TypeAlias = tuple[Mapping[str, Placed], Sequence[Placed]]
"""Where the tensors of a call may be: those arguments that are not replicated, by name, and every
result. A number is the dimension that is sharded, ``"sum"`` means partial sums, None replicated."""

Rules: TypeAlias = Sequence[Rule] | Callable[..., Sequence[Rule]]
"""Rules of an operator; or a function of its arguments, whose tensors have a shape and a mesh."""

_declared: dict[str, Rules] = {}  # those that DTensor does not have yet
_lock = threading.Lock()


def declare(name: str, rules: Rules) -> None:
    """Say how an operator may be sharded; that all of it may be replicated goes without saying."""
    _declared[name] = rules


def is_sharded(x: object) -> bool:
    """Whether ``x`` is a DTensor."""
    cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(x, cls)


def beside(x: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tables for a call with ``x``: replicated where that is a DTensor, else as they are."""
    if not is_sharded(x):
        return tables
    return tuple(table if is_sharded(table) else _replicated(x, table) for table in tables)


def tables_of(operator: torch._ops.OpOverload) -> tuple[bool, ...]:
    """Whether each argument of an operator is a table, for :func:`call`."""
    names = {"views", "rows", "cos", "sin"}  # every rank computes them for itself
    return tuple(argument.name in names for argument in operator._schema.arguments)


def call(operator: torch._ops.OpOverload, args: tuple[Any, ...], tables: tuple[bool, ...]) -> Any:
    """Call an operator with tensors that are not plain; DTensors get tables of their own kind."""
    sharded = next(filter(is_sharded, args), None)
    if sharded is None:
        return operator(*args)
    _register()
    pairs = zip(args, tables, strict=True)
    return operator(*(beside(sharded, x)[0] if is_table else x for x, is_table in pairs))


def _replicated(like: Any, table: torch.Tensor) -> torch.Tensor:
    mesh, tensor = like.device_mesh, sys.modules["torch.distributed.tensor"]
    placements = [tensor.Replicate()] * mesh.ndim
    return tensor.DTensor.from_local(table, mesh, placements, run_check=False)


def _register() -> None:
    """Give DTensor the rules that it does not have yet."""
    with _lock:
        for name in list(_declared):
            _add(getattr(torch.ops.uhd_ops, name).default, _declared[name])
            del _declared[name]


# torch.compile calls it where it traces a call. The decorator for that imports torch._dynamo.
_register._dynamo_marked_constant = True


def _add(operator: torch._ops.OpOverload, rules: Rules) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placed(where: Placed) -> Any:
        if where is None:
            return Replicate()
        return Partial() if where == "sum" else Shard(where)

    names = [argument.name for argument in operator._schema.arguments]
    everywhere: Rule = {}, [None] * len(operator._schema.returns)

    @register_sharding(operator)
    def acceptable(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        chosen: Iterable[Rule] = rules(*args) if callable(rules) else rules
        return [
            (
                [placed(where) for where in results],
                [
                    placed(sides.get(name)) if hasattr(argument, "tensor_meta") else None
                    for name, argument in zip(names, args, strict=True)
                ],
            )
            for sides, results in (everywhere, *chosen)
        ]
