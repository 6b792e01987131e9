# SPDX-License-Identifier: Apache-2.0
"""Find the tests that compare bits, so that conftest.py marks them and none can be forgotten.

.ci/machines.sh runs these tests again as on other machines, whose products round otherwise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest

# torch.equal and Tensor.equal, np.array_equal, np.testing.assert_array_equal, and tolerances given
# by the caller, which may be zero.
_COMPARISONS = {"equal", "array_equal", "assert_array_equal", "rtol"}
_TESTS = Path(__file__).resolve().parent


def compares_bits(item: pytest.Item) -> bool:
    """Whether a test, a fixture of it, or any function of ours that they name compares bits."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [definition.func for several in fixtures for definition in several]
    return any(leads_to_a_comparison(function) for function in (item.function, *functions))


@functools.cache
def leads_to_a_comparison(function: Callable) -> bool:
    """Whether a function, or any function or class of ours that it names, compares bits."""
    found, seen = [function], set()
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type) and value.__module__ in sys.modules:
            if _is_ours(getattr(sys.modules[value.__module__], "__file__", None)):
                found += vars(value).values()
        elif isinstance(value, FunctionType) and _is_ours(value.__code__.co_filename):
            names = set(_names(value.__code__))
            if names & _COMPARISONS:
                return True
            found += [value.__globals__[name] for name in names & value.__globals__.keys()]
        # What a decorator made: by a closure, functools.wraps (static and class methods too),
        # property or hypothesis.
        if isinstance(value, FunctionType):
            found += [cell.cell_contents for cell in value.__closure__ or ()]
            found += [getattr(getattr(value, "hypothesis", None), "inner_test", None)]
        if isinstance(value, (FunctionType, staticmethod, classmethod, property)):
            found += [getattr(value, "__wrapped__", None), getattr(value, "fget", None)]
    return False


def _is_ours(file: str | None) -> bool:
    return file is not None and _TESTS in Path(file).parents


def _names(code: CodeType) -> Iterator[str]:
    """Yield every name that the code reads: globals, attributes and keywords of calls."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, tuple):
            yield from (name for name in constant if isinstance(name, str))
