# SPDX-License-Identifier: Apache-2.0
"""Modules change their class in place: parameters, names and hooks stay, methods are replaced.

Both the retrofit and the integrations do so. Why this and not a wrapper or a hook:
docs/adr/0003-retrofit-mechanism.md.
"""

from __future__ import annotations

import functools
from typing import Any


class Mixed:
    """Base of the mixins that stand in front of the class of a module that the user has.

    Attributes:
        prefix: What the name of a class made from this mixin begins with. None where a library
            finds things out by the names of classes, as transformers does: which outputs a model
            records, what ``config.json`` calls it, which modules no device map may split.
        mixin: This class, in the classes made from it.
        body_class: The class that the module had, in the classes made from it.
    """

    prefix: str = ""
    mixin: type[Mixed]
    body_class: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if not is_mixed(type(self)):  # somebody extended ours: that is theirs
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so it is pickled by those that it is made of.
        _, _, *state = super().__reduce_ex__(max(int(protocol), 2))
        mixins, cls = [], type(self)
        while is_mixed(cls):  # a block between two merges has two mixins
            mixins.append(cls.mixin)
            cls = cls.body_class
        return _new, (tuple(mixins), cls), *state


@functools.cache
def mixed(mixin: type[Mixed], cls: type) -> type:
    """Return ``cls`` with the methods of ``mixin`` in front of its own."""
    name = f"{mixin.prefix}{cls.__name__}"
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__.removesuffix(cls.__name__) + name,
        "__doc__": cls.__doc__,
        "mixin": mixin,
        "body_class": cls,
    }
    return type(name, (mixin, cls), namespace)


def is_mixed(cls: type) -> bool:
    """Whether :func:`mixed` made this very class, and not one that it extends."""
    return "body_class" in vars(cls)


def body_class(module: object) -> type:
    """The class of a module without our mixins: the one whose forward it runs."""
    cls = type(module)
    while hasattr(cls, "body_class"):
        cls = cls.body_class
    return cls


def _new(mixins: tuple[type[Mixed], ...], cls: type) -> Any:
    """Make an empty module, for pickle and copy; the first mixin stands in front."""
    for mixin in reversed(mixins):
        cls = mixed(mixin, cls)
    return cls.__new__(cls)
