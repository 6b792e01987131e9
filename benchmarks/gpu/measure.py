# SPDX-License-Identifier: Apache-2.0
"""Measure one case: check every implementation against float64, then time all of them in turn."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gpu import problems, timing
from gpu.cases import BACKWARD, FORWARD, Case

OURS = "ours"
# This only has to tell a right result from a wrong one: half-precision rivals round at every step.
SANE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4, "float64": 1e-9}
COMPILE_LIMIT_S = 40.0
THOROUGH_S, QUICK_S = 4.0, 1.5  # of timing per case, the preparation not included


class DeadDeviceError(RuntimeError):
    """The CUDA context is lost: nothing more can be measured in this process."""

    def __init__(self, implementation: str, message: str) -> None:
        super().__init__(message)
        self.implementation = implementation


@dataclass
class Entry:
    """One implementation, ready to be timed, and its samples."""

    facts: dict[str, object]
    sample: Callable[[], float]
    samples: list[float] = field(default_factory=list)


def leaves_of(function: problems.Function, tensors: problems.Tensors) -> list[torch.Tensor]:
    """Return what takes a gradient: the inputs, and the parameters that a module has itself."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    if isinstance(function, torch.nn.Module):
        leaves += list(function.parameters())
    return leaves


def as_tuple(result: object) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def call_of(case: Case, function, tensors, seed: int) -> timing.Call:
    """Return what is timed: a call without arguments that returns a tuple of tensors.

    A backward pass is timed alone, over a graph that is built once and kept.
    """
    if case.direction == FORWARD:

        def forward():
            with torch.no_grad():
                return as_tuple(function(*tensors))

        return forward

    leaves = leaves_of(function, tensors)
    arguments = leaves[: len(tensors)]
    results = as_tuple(function(*arguments))
    grads = [_grad_like(case, y, seed + position) for position, y in enumerate(results)]

    def gradients(outputs, **options):
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, **options)
        return tuple(grad for grad in found if grad is not None)

    if case.direction == BACKWARD:
        return lambda: gradients(results, retain_graph=True)
    return lambda: gradients(as_tuple(function(*arguments)))


def _grad_like(case: Case, y: torch.Tensor, seed: int) -> torch.Tensor:
    # The same numbers for every implementation, and for the definition too: rounded to the case's
    # dtype before they become float64.
    generator = torch.Generator(y.device).manual_seed(1000 + seed)
    grad = torch.randn(y.shape, generator=generator, device=y.device)
    return grad.to(getattr(torch, case.dtype)).to(y.dtype)


def relative_error(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative error in the Euclidean norm; infinite where anything is NaN."""
    if len(results) != len(expected):
        raise ValueError(f"expected {len(expected)} results, got {len(results)}")
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        error = float((result.detach().double() - wanted).norm() / wanted.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def expected_of(case: Case, tensors: problems.Tensors, function=None):
    """Return float64 results on the rounded inputs, of the definition or of ``function`` itself."""
    wide = tuple(x.double() for x in tensors)
    if function is None:
        function = problems.definition(case)
    elif isinstance(function, torch.nn.Module):
        function = copy.deepcopy(function).double()
    return tuple(y.detach() for y in call_of(case, function, wide, seed=0)())


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, device: torch.device, timer, seconds_left: float, skip: dict[str, str]):
    """Measure a case and return its row.

    Args:
        case: What to measure.
        device: Where.
        timer: timing.CudaTimer or timing.HostTimer.
        seconds_left: Nothing is prepared that would not fit in them.
        skip: Implementations that must not run, with the reason: they ended an earlier process.

    Raises:
        DeadDeviceError: An implementation lost the CUDA context.
    """
    deadline = time.monotonic() + seconds_left
    row = {
        **{key: getattr(case, key) for key in ("op", "direction", "dtype", "tokens", "window")},
        **{key: getattr(case, key) for key in ("thorough", "bytes_moved", "flops")},
        "case": case.name,
        "grid": list(case.grid),
        "compute_bound": case.compute_bound,
        "limit": SANE[case.dtype],
        "rivals": {},
        "failed": dict(skip),
    }
    count = timing.copies_for(_input_bytes(case, device), timer.l2_bytes)
    copies = [problems.inputs(case, device, seed) for seed in range(count)]
    row["copies"] = count
    expected = expected_of(case, copies[0])
    entries: dict[str, Entry] = {}
    ours = problems.Rival(OURS, problems.ours)
    rivals = [rival for rival in problems.RIVALS[case.op] if rival.takes_part(case)]
    for rival in (ours, *rivals):
        if rival.name in skip:
            continue
        left = max(0.0, min(COMPILE_LIMIT_S, deadline - time.monotonic() - 2))
        prepared = _attempt(rival, case, device, timer, copies, expected, left)
        if isinstance(prepared, Entry):
            entries[rival.name] = prepared
        else:
            row["failed"][rival.name] = prepared
    if OURS not in entries:
        row["error"] = f"ours: {row['failed'].get(OURS, 'not run')}"
        return row
    _sample(entries, min(THOROUGH_S if case.thorough else QUICK_S, deadline - time.monotonic()))
    _summarise(row, entries)
    return row


def _input_bytes(case: Case, device: torch.device) -> int:
    tensors = problems.inputs(case, device, 0)
    return sum(x.numel() * x.element_size() for x in tensors)


def _attempt(rival, case, device, timer, copies, expected, seconds) -> Entry | str:
    try:
        return _prepare(rival, case, device, timer, copies, expected, seconds)
    except Exception as error:  # noqa: BLE001 - a rival may fail in any way; the reason is recorded
        # The text only: the traceback would keep the tensors of every frame alive.
        message = f"{type(error).__name__}: {str(error).strip()}"[:400]
    try:
        timer.synchronize()
    except RuntimeError as error:
        raise DeadDeviceError(rival.name, message) from error
    release(device)
    return message


def _prepare(rival, case, device, timer, copies, expected, seconds) -> Entry:
    start = time.monotonic()
    with timing.time_limit(seconds, "compiling and the first call"):
        function = rival.make(case, device)
        first = call_of(case, function, copies[0], seed=0)
        results = first()
        timer.synchronize()
    facts = {"first_call_s": round(time.monotonic() - start, 2)}
    if not rival.same_function:
        expected = expected_of(case, copies[0], function)
    facts["rel_err"] = relative_error(results, expected)
    if not facts["rel_err"] <= SANE[case.dtype]:
        raise ValueError(f"wrong: relative error {facts['rel_err']:.1e} above {SANE[case.dtype]}")
    del results
    facts["peak_bytes"] = timer.peak_bytes(first)
    facts["same_function"] = rival.same_function
    calls = [first]
    for seed, tensors in enumerate(copies[1:], 1):
        calls.append(call_of(case, function, tensors, seed))
        calls[-1]()
    sample, facts["timed_by"] = timer.prepare(calls)
    return Entry(facts, sample)


def _sample(entries: dict[str, Entry], seconds: float) -> None:
    """Time in rounds: ours, every rival, ours again; a slow spell then hits all of them."""
    order = [*entries.values(), entries[OURS]]
    start = time.monotonic()
    for entry in order:
        entry.sample()
    rounds = timing.rounds_for(time.monotonic() - start, seconds)
    for _ in range(rounds):
        for entry in order:
            entry.samples.append(entry.sample())


def _summarise(row: dict, entries: dict[str, Entry]) -> None:
    ours = entries.pop(OURS)
    first, second = ours.samples[::2], ours.samples[1::2]
    row["ours"] = {
        **ours.facts,
        **timing.summary_of(ours.samples),
        "spread": timing.spread_of(first, second),
    }
    for name, entry in entries.items():
        row["rivals"][name] = {**entry.facts, **timing.summary_of(entry.samples)}
