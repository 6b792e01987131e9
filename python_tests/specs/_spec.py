# SPDX-License-Identifier: Apache-2.0
"""What tests need to know about an operator, in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

ORDERS = ("raster", "block", (3, 2))
"""Values of ``order_in``: the default, one with a name, nested blocks."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an operator.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        differentiable: Positions and names of the tensors that take a gradient.
        per_token: Positions of the tensors whose first dimension is the packed tokens.
        grids: Position of the grids; None for an operator without grids.
    """

    args: tuple
    kwargs: Mapping[str, object] = field(default_factory=dict)
    differentiable: tuple[int | str, ...] = (0,)
    per_token: tuple[int, ...] = (0,)
    grids: int | None = 1

    def get(self, key: int | str) -> object:
        """Return one argument by position or name."""
        return self.args[key] if isinstance(key, int) else self.kwargs[key]

    def put(self, key: int | str, value: object) -> Call:
        """Return this call with one argument replaced."""
        if isinstance(key, int):
            return replace(self, args=(*self.args[:key], value, *self.args[key + 1 :]))
        return replace(self, kwargs={**self.kwargs, key: value})

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """Return this call with ``function`` applied to every floating-point tensor."""
        call = self
        for key in (*range(len(self.args)), *self.kwargs):
            value = call.get(key)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                call = call.put(key, function(value))
        return call

    def to(self, device: str) -> Call:
        """Return this call with its floating-point tensors on ``device``."""
        return self.map_tensors(lambda x: x.to(device))

    def exact(self) -> Call:
        """Return this call in float64 on the CPU, where the definition runs."""
        return self.map_tensors(lambda x: x.cpu().double())

    def only_view(self, index: int) -> Call:
        """Return the call on one view of the packed sequence."""
        grids = list(self.get(self.grids))
        start = sum(h * w for h, w in grids[:index])
        stop = start + grids[index][0] * grids[index][1]
        call = self.put(self.grids, [grids[index]])
        for position in self.per_token:
            call = call.put(position, self.get(position)[start:stop])
        return call


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused: how to spoil a good call, and the error it must raise."""

    label: str
    spoil: Callable[[Call], Call]
    error: type[Exception]
    message: str  # the whole text, exactly; "..." stands for any text

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Attributes:
        name: Name of the public function, of its definition, and of its folder in ``csrc``.
        reference: The definition: plain PyTorch, any float dtype, differentiable.
        make: ``make(grids, dtype, generator=..., **options)`` returns a Call on random numbers.
        options: Values that every option of ``make`` may take; the first is the default.
        bad_inputs: What must be refused.
        roundings: Bound on the relative error of an element in units of the accumulation type's
            epsilon, forward or backward, relative to the largest element of the result. Derived in
            the function's docstring.
        scale: Size of what a gradient adds up, where all of its elements may cancel to less; 0
            where its largest element tells that.
        stored_roundings: How many times a value is rounded to the tensors' own dtype on its way to
            the result.
        output: What a row of the result belongs to: "tokens", "windows", or None for an operator
            without grids.
        autocast: Under autocast, "cast": the operator runs on tensors cast to the autocast dtype;
            "ignore": it does what it does without autocast; "mixed": only some of it is cast.
        exempt: Checks of the generic tests that do not hold, each with the reason.
            "batch_invariance", "threads" and "strides": the same up to the tolerance instead of bit
            for bit in another batch, by another number of threads, in another memory layout.
            "memory": temporaries may be larger than the input.
            "non_finite": NaN and infinities are not where the definition has them.
            "second_derivative": refused with another error than ours.
            "native": it has no kernels of its own, so there is nothing for opcheck to check, and
            torch.compile may make a graph for each new list of grids.
    """

    name: str
    reference: Callable[..., torch.Tensor]
    make: Callable[..., Call]
    options: Mapping[str, tuple]
    bad_inputs: tuple[BadInput, ...]
    roundings: Callable[[Call], float]
    output: str | None
    scale: Callable[[Call], float] = lambda call: 0.0
    stored_roundings: int = 1
    autocast: str = "ignore"
    exempt: Mapping[str, str] = field(default_factory=dict)

    def tolerance(
        self, call: Call, dtype: torch.dtype, expected: torch.Tensor, gradient: bool = False
    ) -> torch.Tensor:
        """Largest allowed difference from the float64 result or gradient, element by element.

        Two parts: ``stored_roundings`` roundings to ``dtype`` (each half an epsilon of the element,
        or half the smallest subnormal), and ``roundings`` roundings in the accumulation type,
        relative to the largest element, because sums over a window or over channels may cancel; of
        a gradient at least to ``scale``.
        """
        info = torch.finfo(dtype)
        accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        largest = expected.abs().max().item() if expected.numel() else 0.0
        largest = max(largest, self.scale(call)) if gradient else largest
        stored = (expected.abs() * info.eps + info.smallest_normal * info.eps) * 0.5
        slack = self.roundings(call) * accumulate.eps * largest
        return self.stored_roundings * stored * (1 + info.eps) + slack


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None
) -> torch.Tensor:
    """Standard normal numbers, the same for every dtype up to its rounding."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
