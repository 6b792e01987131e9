# SPDX-License-Identifier: Apache-2.0
"""Checks of a call that are not made again for the next one like it.

What an operator's checks accept, and what they compute on the way, depends on the metadata of its
tensors, on its grids and on its options: never on a value in a tensor. So that is kept with the
tables of the grids, within their limit of memory, and found again by the metadata.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from uhd_ops._cache import clock, kept
from uhd_ops._native import PLAIN_TENSORS, is_eager
from uhd_ops.grids import Grids, PackedGrids

_of_tensor = operator.attrgetter("__class__", "shape", "dtype", "device", "layout")
_any_autocast = torch._C._is_any_autocast_enabled
# Options that are equal only where they are the same; a tuple may hold 2.0 for 2.
_SIMPLE = frozenset({bool, int, float, str, type(None)})

Checked: TypeAlias = tuple[Any, tuple[Any, ...] | None]


def checked_once(check: Callable[..., Checked], optional: bool = False) -> Callable[..., Checked]:
    """Make ``check(*tensors, grids, *options)`` remember what it returned for the same metadata.

    What it returns must depend on nothing but the shapes, dtypes and devices of the tensors, on
    grids, options and autocast, and must hold no tensor that was passed. It is called as ever
    wherever a call is not quite ordinary: while torch.compile or another transformation is at work,
    for subclasses of tensors, for grids that are not PackedGrids, in :func:`uhd_ops.definitions`,
    and where it raises.

    Args:
        check: Checks the arguments of an operator. It returns what it found, of any type; and what
            follows the tensors in a call of the native operator, if they can go there as they are,
            or None.
        optional: Whether tensors may be None.

    Returns:
        A function of tensors (or None), grids and options, each a tuple but the grids. It returns
        what ``check`` does, but the latter only for a call that was found again, which may take
        the ``eager`` form of the operator (:func:`uhd_ops._native.register`).
    """
    of = _of_tensor_or_none if optional else _of_tensor

    @functools.wraps(check)
    def find(
        tensors: Sequence[torch.Tensor | None], grids: Grids, options: tuple[Any, ...] = ()
    ) -> Checked:
        if type(grids) is not PackedGrids or not is_eager():
            return check(*tensors, grids, *options)[0], None
        try:
            # Equal is not the same: 2.0 and True are not window sides.
            key = options, *map(type, options), *map(of, tensors)
            if _any_autocast():
                key += _autocast_dtypes()
            tables = grids._tables
            last = tables.last.get(check)
            if last is not None and last[0] == key:
                tables.used = next(clock)
                return last[1]
            key = check, key
            found = tables.get(key)
        except (AttributeError, TypeError):  # no tensor, no hash, or grids that keep nothing
            return check(*tensors, grids, *options)[0], None
        device = tensors[0].device
        if found is not None:  # on CUDA, streams may have to wait
            found = kept(grids, key, device, lambda: found)
            if device.type != "cuda":
                tables.last[check] = key[1], found
            return found
        found = check(*tensors, grids, *options)
        if _SIMPLE.issuperset(map(type, options)) and PLAIN_TENSORS.issuperset(map(type, tensors)):
            kept(grids, key, device, lambda: found)
        return found[0], None

    return find


def _of_tensor_or_none(x: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else _of_tensor(x)


def _autocast_dtypes() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )
