# SPDX-License-Identifier: Apache-2.0
"""Parts of a model in a compiled graph: one operator runs them when the graph runs.

Positions of a view, biases on its scores, attention by a module of the host: what needs the sides
of a view as integers is the model's own code in a loop over the views. If torch.compile traced it,
every set of grids would have a graph of its own. So the graph holds one operator, which finds the
encoder by a number and runs that code. It is given the parameters that the code reads, for which
its backward pass runs the code again, with the same random numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from uhd_ops._cache import outlives_modes
from uhd_ops.grids import PackedGrids

_ONE = PackedGrids([(1, 1)])
_encoders: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(encoder: nn.Module) -> int:
    """Return a number by which the operator finds an encoder, as long as there is one.

    Args:
        encoder: ``encoder.packed(grids)`` returns a ``uhd_ops.retrofit.packed.PackedModel``.
    """
    number = next(_numbers)
    _encoders[number] = encoder
    return number


def run_in_graph(
    model: Any,
    part: str,
    rows: Sequence[int],
    *,
    sides: torch.Tensor,
    inputs: Sequence[torch.Tensor] = (),
    of_one: Sequence[int] = (),
    call: Sequence[int] = (),
    numbers: Sequence[float] = (),
    seed: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Put a part of a model into the graph that is being made; return its results.

    Args:
        model: A ``uhd_ops.retrofit.packed.PackedModel``.
        part: As for its ``run_part``, like ``sides``, ``call`` and ``numbers``.
        rows: Those of each result; those of the last one if there are more results.
        sides: One for all views, or one for each, int64 on the CPU.
        inputs: What the part works on.
        of_one: Rows that each of them would have for a single view of one token.
        call: Integers that do not depend on the grids.
        numbers: Others.
        seed: What its random numbers begin with; None if it draws none.
    """
    device = model.like(model.vit).device.type
    mixed = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.ops.uhd_ops._model_part(
        model.part_tensors(part, call),
        list(inputs),
        model.grids.rows,
        sides,
        seed,
        list(rows),
        list(of_one),
        model.number,
        part,
        list(call),
        list(numbers),
        torch.get_autocast_dtype(device) if mixed else None,
    )


def _model(encoder: int, grids: PackedGrids) -> Any:
    found = _encoders.get(encoder)
    if found is None:
        raise RuntimeError(
            "the SliceEncoder that a compiled graph was made of is gone; parts of it are run by "
            "the model, so keep it, and compile or export anew in another process"
        )
    model = found.packed(grids)
    model.number = None  # nothing is left to the operator inside of it
    return model


@contextlib.contextmanager
def _as_traced(like: torch.Tensor, seed: int | None, autocast: torch.dtype | None) -> Iterator:
    """Draw from this seed, and cast as where the graph was made."""
    with contextlib.ExitStack() as stack:
        device = like.device
        if seed is not None:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            torch.manual_seed(seed)
        if device.type in ("cpu", "cuda"):
            enabled = autocast is not None
            stack.enter_context(torch.autocast(device.type, autocast, enabled=enabled))
        yield


def _run(
    given: list[torch.Tensor],
    inputs: list[torch.Tensor],
    rows: torch.Tensor,
    sides: torch.Tensor,
    seed: torch.Tensor | None,
    encoder: int,
    part: str,
    call: list[int],
    numbers: list[float],
    autocast: torch.dtype | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a part; return its results, and the tensors of the model that it was given."""
    model = _model(encoder, PackedGrids.of(rows[:-1]))
    own = model.part_tensors(part, call)
    # A program that was exported in another process may find an encoder by the same number.
    same = len(own) == len(given) and all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in zip(own, given, strict=True)
    )
    if not same:
        raise RuntimeError(
            "parts of a compiled SliceEncoder are run by the model that it was compiled with, "
            "whose parameters must be those that the graph was given"
        )
    seed = None if seed is None else int(seed)
    with _as_traced(model.like(model.vit), seed, autocast):
        return model.run_part(part, inputs, sides.tolist(), call, numbers), own


torch.library.define(
    "uhd_ops::_model_part",
    "(Tensor[] given, Tensor[] inputs, Tensor rows, Tensor sides, Tensor? seed, SymInt[] num_rows, "
    "int[] of_one, int encoder, str part, int[] call, float[] numbers, ScalarType? autocast)"
    " -> Tensor[]",
)
torch.library.define(
    "uhd_ops::_model_part_backward",
    "(Tensor?[] grads, Tensor[] given, Tensor[] inputs, Tensor rows, Tensor sides, Tensor? seed, "
    "int encoder, str part, int[] call, float[] numbers, ScalarType? autocast, int[] wanted)"
    " -> Tensor[]",
)


@torch.library.impl("uhd_ops::_model_part", "default")
def _forward(given, inputs, rows, sides, seed, num_rows, of_one, *call):
    made, _ = _run(given, inputs, rows, sides, seed, *call)
    # Of ratios that belong to other grids, say.
    if any(len(x) != count for x, count in zip(made, num_rows, strict=False)):
        raise RuntimeError(
            f"{call[1]!r} of a compiled SliceEncoder must return {num_rows} rows for these grids, "
            f"got {[len(x) for x in made]}"
        )
    # An operator returns no views of what it was given: prefix tokens that are expanded, say.
    seen = {x.untyped_storage().data_ptr() for x in (*given, *inputs)}
    return [x.clone() if x.untyped_storage().data_ptr() in seen else x for x in made]


@torch.library.register_fake("uhd_ops::_model_part")
def _fake(
    given, inputs, rows, sides, seed, num_rows, of_one, encoder, part, call, numbers, autocast
):
    with outlives_modes(), torch.no_grad():
        model = _model(encoder, _ONE)
        shapes = [(n, *map(int, x.shape[1:])) for n, x in zip(of_one, inputs, strict=True)]
        kinds = [(x.dtype, x.device) for x in inputs]
        ones = [torch.ones(s, dtype=t, device=d) for s, (t, d) in zip(shapes, kinds, strict=True)]
        with _as_traced(model.like(model.vit), None if seed is None else 0, autocast):
            made = model.run_part(part, ones, [1], call, numbers)
    counts = [*num_rows, *num_rows[-1:] * (len(made) - len(num_rows))]
    return [
        torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device)
        for count, x in zip(counts, made, strict=False)
    ]


@torch.library.impl("uhd_ops::_model_part_backward", "default")
def _backward_kernel(grads, given, inputs, rows, sides, seed, encoder, part, *call):
    *call, wanted = call
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        made, own = _run(given, inputs, rows, sides, seed, encoder, part, *call)
    leaves = [*own, *inputs]
    pairs = [(x, g) for x, g in zip(made, grads, strict=True) if x.requires_grad and g is not None]
    outputs, grads = [x for x, _ in pairs], [g for _, g in pairs]
    leaves = [leaves[index] for index in wanted]
    return list(torch.autograd.grad(outputs, leaves, grads, materialize_grads=True))


@torch.library.register_fake("uhd_ops::_model_part_backward")
def _backward_fake(grads, given, inputs, *call):
    tensors = [*given, *inputs]
    return [torch.empty_like(tensors[index]) for index in call[-1]]


def _setup_context(ctx, inputs, output):
    given, worked_on, rows, sides, seed, _, _, *ctx.call = inputs
    ctx.save_for_backward(*given, *worked_on, rows, sides, seed)
    ctx.counts = len(given), len(worked_on)
    # torch takes an empty list for one of tensors, whose gradients are none.
    ctx.others = [x if isinstance(x, list) and not x else None for x in inputs[2:]]


def _backward(ctx, grads):
    *tensors, rows, sides, seed = ctx.saved_tensors
    first, second = ctx.counts
    needed = [*(ctx.needs_input_grad[0] or ()), *(ctx.needs_input_grad[1] or ())]
    wanted = [index for index, need in enumerate(needed) if need]
    split = tensors[:first], tensors[first:]
    call = rows, sides, seed, *ctx.call, wanted
    found = torch.ops.uhd_ops._model_part_backward(grads, *split, *call)
    places = dict(zip(wanted, found, strict=True))
    both = [places.get(index) for index in range(first + second)]
    return both[:first], both[first:], *ctx.others


torch.library.register_autograd("uhd_ops::_model_part", _backward, setup_context=_setup_context)
