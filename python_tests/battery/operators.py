# SPDX-License-Identifier: Apache-2.0
"""What the battery runs over: operators, their options, devices, and variants of the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import pytest
import torch
from specs import SPECS

import uhd_ops
from uhd_ops import _native

OPS = sorted(SPECS)
GRIDDED = [name for name in OPS if SPECS[name].output is not None]
# 39 tokens: full 2 x 2 windows only, then ragged ones on both edges.
GRIDS = [(4, 6), (3, 5)]
# No two sets have the same number of tokens, of views and of distinct lengths all at once.
TWELVE = (
    *([(4, 6)], [(5, 5)], [(8, 8)], [(4, 6), (3, 5)], [(2, 2), (9, 7)], [(1, 1), (6, 6), (3, 8)]),
    *([(7, 7)] * 4, [(16, 12)], [(3, 3)] * 9, [(10, 2), (2, 10)], [(5, 4)] * 2, [(12, 12), (6, 6)]),
)


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


def isas(device: str) -> tuple[str, ...]:
    """Return the variants of the kernels on a device; those of a GPU count as one."""
    return ISAS if device == "cpu" else (device,)


def device_of(isa: str) -> str:
    """Return the device of a variant."""
    return "cuda" if isa == "cuda" else "cpu"


@contextlib.contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Run the body on one variant of the kernels."""
    if isa in ("reference", "cuda"):
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


def per_op(names: list[str] = OPS, cuda: Collection[str] = NATIVE) -> pytest.MarkDecorator:
    """Parametrize a test by ``name`` and ``device``.

    Args:
        names: Operators.
        cuda: Those among them that are also tested on a GPU; what torch's own kernels do there
            beyond the right numbers is not known.
    """
    cases = [(name, device) for name in names for device in _devices(name, cuda)]
    return parametrize(("name", "device"), cases)


def per_case(names: list[str] = OPS, cuda: Collection[str] = NATIVE) -> pytest.MarkDecorator:
    """Parametrize a test by ``name``, ``options`` and ``device``; arguments as :func:`per_op`."""
    cases = [
        (name, options, device)
        for name in names
        for options in option_cases(name)
        for device in _devices(name, cuda)
    ]
    return parametrize(("name", "options", "device"), cases)


def per_variant(names: list[str] = OPS, cuda: Collection[str] = NATIVE) -> pytest.MarkDecorator:
    """Parametrize a test by ``name``, ``options``, ``isa`` and ``dtype``, so that all kernels run.

    One dtype is enough for those of a CPU, which convert what they load. On a GPU half types have
    kernels of their own.
    """
    halves = (torch.bfloat16, torch.float16)
    cases = [
        (name, options, isa, dtype)
        for name in names
        for options in option_cases(name)
        for device in _devices(name, cuda)
        for isa in isas(device)
        for dtype in (torch.float32, *(halves if device == "cuda" else ()))
    ]
    return parametrize(("name", "options", "isa", "dtype"), cases)


def _devices(name: str, cuda: Collection[str] = NATIVE) -> tuple[str, ...]:
    """Return the devices that an operator is tested on, given those with tests on a GPU."""
    return ("cpu", "cuda") if name in cuda else ("cpu",)


def parametrize(arguments: tuple[str, ...], cases: list[tuple]) -> pytest.MarkDecorator:
    """Parametrize a test by cases that say where they run; a GPU's are marked ``cuda``."""

    def param(*case):
        words = []
        for value in case:
            options = isinstance(value, dict)
            words += [f"{k}={v}" for k, v in value.items()] if options else [str(value)]
        marks = [pytest.mark.cuda] if "cuda" in case else []
        return pytest.param(*case, id="-".join(words).replace("torch.", ""), marks=marks)

    return pytest.mark.parametrize(arguments, [param(*case) for case in cases])
