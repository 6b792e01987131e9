# SPDX-License-Identifier: Apache-2.0
"""Modules change their class in place: parameters, names and hooks stay, methods are replaced.

Why this and not a wrapper or a hook: docs/adr/0003-retrofit-mechanism.md.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Accelerated(nn.Module):
    """Base of the classes whose methods replace those of a class of another library.

    Attributes:
        replaced: Names of the methods that this class replaces.
        part_class: This class, in the classes made from it.
        original_class: The class that the module had, in the classes made from it.
    """

    replaced: tuple[str, ...] = ()
    part_class: type[Accelerated]
    original_class: type[nn.Module]

    @staticmethod
    def check(module: nn.Module, name: str) -> None:
        """Raise NotImplementedError if the options of ``module`` are not supported."""

    def extra_repr(self) -> str:
        """Mark the module: its class has the name of the original."""
        return ", ".join(filter(None, ("uhd_ops", super().extra_repr())))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if "original_class" not in vars(type(self)):  # somebody extended ours: that is theirs
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so it is pickled by the two that it extends.
        _, _, *state = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (self.part_class, self.original_class), *state


@functools.cache
def accelerated_class(part: type[Accelerated], cls: type[nn.Module]) -> type[nn.Module]:
    """Return ``cls`` with the methods of ``part`` in front of its own.

    It has the name of ``cls``: transformers finds out by name what outputs a model records, writes
    the name into ``config.json``, and looks for the names of modules that must not be split.
    """
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "part_class": part,
        "original_class": cls,
    }
    return type(cls.__name__, (part, cls), namespace)


def _new(part: type[Accelerated], cls: type[nn.Module]) -> nn.Module:
    """Make an empty module, for pickle and copy."""
    accelerated = accelerated_class(part, cls)
    return accelerated.__new__(accelerated)
