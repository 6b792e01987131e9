# SPDX-License-Identifier: Apache-2.0
"""Compare results: within the SPEC's tolerance of the float64 definition, or bit for bit."""

from __future__ import annotations

import torch
from specs import SPECS, Call, OpSpec

from uhd_ops import _native

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def assert_close(
    spec: OpSpec,
    call: Call,
    actual: torch.Tensor,
    exact: torch.Tensor,
    what: str = "result",
    gradient: bool = False,
) -> None:
    """``actual`` has the shape of ``exact``, float64, and lies within the operator's tolerance."""
    actual = actual.cpu()
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert exact.dtype == torch.float64
    error = (actual.double() - exact).abs()
    allowed = spec.tolerance(call, actual.dtype, exact, gradient)
    wrong = ~(error <= allowed)  # a NaN is wrong
    if wrong.any():
        worst = int(torch.where(wrong, error / allowed, 0).nan_to_num(float("inf")).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; the worst is "
            f"{actual.flatten()[worst]} instead of {exact.flatten()[worst]}, "
            f"allowed error {allowed.flatten()[worst]}"
        )


def assert_gradients_close(spec: OpSpec, call: Call, grads, exact, where: str = "") -> None:
    """Every gradient has the dtype of its argument and lies within the operator's tolerance."""
    for key, grad in grads.items():
        assert grad.dtype == call.get(key).dtype
        assert_close(spec, call, grad, exact[key], f"{where}gradient of argument {key!r}", True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit agree; zeros of different sign and NaN payloads differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(bits), b.detach().contiguous().view(bits))


def assert_same_bits(actual, wanted, what: str = "result") -> None:
    """Tensors, or dictionaries of tensors, agree bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert same_bits(actual, wanted), (
            f"{what} differs: {tuple(actual.shape)} {actual.dtype} and {tuple(wanted.shape)} "
            f"{wanted.dtype}, largest difference "
            + (
                f"{(actual.double() - wanted.double()).abs().max()}"
                if actual.shape == wanted.shape and actual.numel()
                else "unknown"
            )
        )
        return
    assert actual.keys() == wanted.keys()
    for key in wanted:
        assert_same_bits(actual[key], wanted[key], f"{what} of argument {key!r}")


def assert_same(
    name: str, check: str, call: Call, actual, wanted, what="result", gradient: bool = False
) -> None:
    """Agree bit for bit, or within twice the tolerance where torch computes the values.

    That is where the SPEC exempts the operator, and in a run on the definitions. Dictionaries are
    those of gradients.
    """
    if check not in SPECS[name].exempt and _native.status["cpu"] != "disabled":
        assert_same_bits(actual, wanted, what)
    elif isinstance(wanted, torch.Tensor):
        allowed = 2 * SPECS[name].tolerance(call, wanted.dtype, wanted.double(), gradient)
        assert actual.dtype == wanted.dtype, what
        assert bool(((actual.double() - wanted.double()).abs() <= allowed).all()), what
    else:
        assert actual.keys() == wanted.keys()
        for key in wanted:
            of = f"{what} of argument {key!r}"
            assert_same(name, check, call, actual[key], wanted[key], of, gradient=True)
