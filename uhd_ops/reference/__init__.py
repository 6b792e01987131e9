# SPDX-License-Identifier: Apache-2.0
"""The definition of every operator: plain PyTorch, without performance tricks.

``uhd_ops.reference.<op>`` has the signature of ``uhd_ops.<op>``, takes any float dtype and is
differentiable. It is what the kernels are tested and benchmarked against, and what runs where no
native library is loaded. It imports nothing but torch.
"""

import importlib
import pkgutil

from uhd_ops.reference._spec import SPECS, BadInput, Call, OpSpec

__all__ = ["SPECS", "BadInput", "Call", "OpSpec"]

# A file in this folder without a leading underscore is an operator: nothing is listed by hand.
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if not _module.startswith("_"):
        _definition = importlib.import_module(f"{__name__}.{_module}")
        SPECS[_module] = _definition.SPEC
        globals()[_module] = getattr(_definition, _module)
        __all__.append(_module)
