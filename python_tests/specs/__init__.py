# SPDX-License-Identifier: Apache-2.0
"""What tests know about every operator: calls, refusals, tolerances.

A file without a leading underscore holds the ``OpSpec`` of the operators that it is named after:
nothing is listed by hand.
"""

import importlib
import pkgutil

from specs._spec import BadInput, Call, OpSpec

__all__ = ["SPECS", "BadInput", "Call", "OpSpec"]

SPECS: dict[str, OpSpec] = {}
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if not _module.startswith("_"):
        for _value in vars(importlib.import_module(f"{__name__}.{_module}")).values():
            if isinstance(_value, OpSpec):
                SPECS[_value.name] = _value
