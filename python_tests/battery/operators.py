# SPDX-License-Identifier: Apache-2.0
"""What the battery runs over: every operator with a SPEC, its options, and the CPU variants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from specs import SPECS

import uhd_ops
from uhd_ops import _native

OPS = sorted(SPECS)
GRIDDED = [name for name in OPS if SPECS[name].output is not None]
# 39 tokens: full 2 x 2 windows only, then ragged ones on both edges.
GRIDS = [(4, 6), (3, 5)]


def not_exempt(check: str, names: list[str] = OPS) -> list[str]:
    """Return the operators that a check holds for."""
    return [name for name in names if check not in SPECS[name].exempt]


# Those with kernels of their own, and not torch's.
NATIVE = not_exempt("native")


def _available_isas() -> tuple[str, ...]:
    if _native.status["cpu"] != "loaded":
        return ("reference",)
    names = ("scalar", "avx2", "avx512")
    active = _native.cpu_isa()
    if active not in names:  # the CUDA kernels in the emulator
        return (active,)
    try:
        for i, name in enumerate(names):
            try:
                _native.set_cpu_isa(name)
            except RuntimeError:  # above what this processor has
                return names[:i]
        return names
    finally:
        _native.set_cpu_isa(active)


ISAS = _available_isas()


@contextlib.contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Run the body on one variant of the CPU kernels, an entry of ISAS."""
    if isa == "reference":
        yield
        return
    active = _native.cpu_isa()
    _native.set_cpu_isa(isa)
    try:
        yield
    finally:
        _native.set_cpu_isa(active)


def public(name: str) -> Callable[..., torch.Tensor]:
    """Return the public function."""
    return getattr(uhd_ops, name)


def expected(name: str) -> Callable[..., torch.Tensor]:
    """Return the definition."""
    return SPECS[name].reference


def option_cases(name: str) -> Iterator[dict[str, object]]:
    """Yield the defaults, then every other value of every option, one at a time."""
    yield {}
    for option, values in SPECS[name].options.items():
        yield from ({option: value} for value in values[1:])


def per_case(names: list[str] = OPS) -> pytest.MarkDecorator:
    """Parametrize a test by ``name`` and ``options``."""
    return pytest.mark.parametrize(
        ("name", "options"),
        [
            pytest.param(name, case, id="-".join([name, *(f"{k}={v}" for k, v in case.items())]))
            for name in names
            for case in option_cases(name)
        ],
    )
