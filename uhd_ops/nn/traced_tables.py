# SPDX-License-Identifier: Apache-2.0
"""Tables of positions in a compiled graph: one operator makes them when the graph runs.

A model's own code makes its positions, once for each grid that occurs. If torch.compile traced it,
every set of grids would have a graph of its own. So the graph holds one operator, which finds the
encoder by a number and runs that code. It is given the parameters that the code reads, for which
its backward pass runs the code again.
"""

from __future__ import annotations

import itertools
import weakref
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


def _model(number: int, grids: PackedGrids) -> Any:
    encoder = _encoders.get(number)
    if encoder is None:
        raise RuntimeError(
            "the SliceEncoder that a compiled graph was made of is gone; its positions are made by "
            "the model, so keep it, and compile or export anew in another process"
        )
    return encoder.packed(grids)


def _live(
    given: list[torch.Tensor], rows: torch.Tensor, number: int
) -> tuple[Any, list[torch.Tensor]]:
    """Return the model for the grids, and the tensors that its code reads."""
    model = _model(number, PackedGrids.of(rows[:-1]))
    own = model.position_tensors()
    # A program that was exported in another process may find an encoder by the same number.
    same = len(own) == len(given) and all(
        a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in zip(own, given, strict=True)
    )
    if not same:
        raise RuntimeError(
            "the positions of a compiled SliceEncoder are made by the model that it was compiled "
            "with, whose tables must be those that the graph was given"
        )
    return model, own


torch.library.define(
    "uhd_ops::_view_tables",
    "(Tensor[] given, Tensor rows, SymInt tokens, int number, str what, int prefix, int[] sides, "
    "int[] views) -> Tensor[]",
)
torch.library.define(
    "uhd_ops::_view_tables_backward",
    "(Tensor?[] grads, Tensor[] given, Tensor rows, int number, str what, int prefix, "
    "int[] sides, int[] views, int[] wanted) -> Tensor[]",
)


@torch.library.impl("uhd_ops::_view_tables", "default")
def _forward(given, rows, tokens, number, what, prefix, sides, views):
    model, _ = _live(given, rows, number)
    return model.make_tables(what, prefix, sides, views)


@torch.library.register_fake("uhd_ops::_view_tables")
def _fake(given, rows, tokens, number, what, prefix, sides, views):
    with outlives_modes(), torch.no_grad():
        made = _model(number, _ONE).make_tables(what, prefix, sides[:1], ())
    return [torch.empty((tokens, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in made]


@torch.library.impl("uhd_ops::_view_tables_backward", "default")
def _backward_kernel(grads, given, rows, number, what, prefix, sides, views, wanted):
    model, own = _live(given, rows, number)
    leaves = [own[index] for index in wanted]
    with torch.enable_grad():
        made = model.make_tables(what, prefix, sides, views)
    pairs = [(x, g) for x, g in zip(made, grads, strict=True) if x.requires_grad and g is not None]
    outputs, grads = [x for x, _ in pairs], [g for _, g in pairs]
    return list(torch.autograd.grad(outputs, leaves, grads, materialize_grads=True))


@torch.library.register_fake("uhd_ops::_view_tables_backward")
def _backward_fake(grads, given, rows, number, what, prefix, sides, views, wanted):
    return [torch.empty_like(given[index]) for index in wanted]


def _setup_context(ctx, inputs, output):
    given, rows, _, *ctx.call = inputs
    ctx.save_for_backward(*given, rows)


def _backward(ctx, grads):
    *given, rows = ctx.saved_tensors
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    found = torch.ops.uhd_ops._view_tables_backward(grads, given, rows, *ctx.call, wanted)
    places = dict(zip(wanted, found, strict=True))
    views = ctx.call[-1] and None  # torch takes an empty list for one of tensors
    return [places.get(index) for index in range(len(given))], *[None] * 6, views


torch.library.register_autograd("uhd_ops::_view_tables", _backward, setup_context=_setup_context)
