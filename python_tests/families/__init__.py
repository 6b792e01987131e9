# SPDX-License-Identifier: Apache-2.0
"""Small random models of every family, each with its definition by hand.

Every file here has ``CASES``, a dictionary of :class:`families.case.Case`.
"""

import importlib
import os
import pkgutil

MODULES = sorted(found.name for found in pkgutil.iter_modules(__path__))
MODULES.remove("case")
# Old versions of timm lack what the other files import: .ci/compat.sh names those that they have.
MODULES = os.environ.get("UHD_OPS_TEST_FAMILIES", "").split() or MODULES


def all_cases():
    """Return the cases of all families by name."""
    cases = {}
    for name in MODULES:
        own = importlib.import_module(f"{__name__}.{name}").CASES
        assert own, f"families/{name}.py has no cases"
        assert not cases.keys() & own.keys(), f"families/{name}.py repeats a name"
        cases |= own
    return cases
