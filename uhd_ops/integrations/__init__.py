# SPDX-License-Identifier: Apache-2.0
"""The operators inside models of other libraries; one package for each library."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uhd_ops.integrations import transformers

__all__ = ["transformers"]


def __getattr__(name: str) -> ModuleType:
    """Import a package here when it is first asked for: the library behind it may be missing."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
