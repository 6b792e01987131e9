# SPDX-License-Identifier: Apache-2.0
"""Make calls of an operator, in every memory layout, and run them forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from threading import Thread

import torch
from specs import SPECS, Call
from torch.utils._python_dispatch import TorchDispatchMode

from battery.operators import GRIDS


def make_call(
    name: str, dtype=torch.float32, grids=GRIDS, *, seed: int = 0, device: str = "cpu", **options
) -> Call:
    """Return a call of the operator on random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return SPECS[name].make(list(grids), dtype, generator=generator, **options).to(device)


def run(function: Callable[..., torch.Tensor], call: Call) -> torch.Tensor:
    """Call ``function``."""
    return function(*call.args, **call.kwargs)


def gradients(
    function: Callable[..., torch.Tensor], call: Call, grad_out: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[int | str, torch.Tensor]]:
    """Run forward and backward.

    Args:
        function: The operator or its definition.
        call: Its arguments. Their memory layout is kept.
        grad_out: Gradient of the result; None for fixed random numbers.

    Returns:
        The result, detached, and the gradient of every differentiable argument.
    """
    for key in call.differentiable:
        call = call.put(key, call.get(key).detach().requires_grad_())
    out = run(function, call)
    if grad_out is None:
        grad_out = random_like(out)
    leaves = [call.get(key) for key in call.differentiable]
    grads = torch.autograd.grad(out, leaves, grad_out.to(out))
    return out.detach(), dict(zip(call.differentiable, grads, strict=True))


def random_like(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return standard normal numbers of the shape, dtype and device of ``x``, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def output_rows(name: str, call: Call, function: Callable[..., torch.Tensor]) -> list[slice]:
    """Return the rows of the result that belong to each view."""
    lengths = [len(run(function, call.only_view(i))) for i in range(len(call.get(call.grids)))]
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def token_rows(grids: Sequence[tuple[int, int]]) -> list[slice]:
    """Return the packed tokens that belong to each view."""
    return [slice(a, b) for a, b in pairwise(accumulate((h * w for h, w in grids), initial=0))]


def batched(call: Call, batch: int) -> Call:
    """Return the call on ``batch`` packed views of one grid as a call on ``(B, h*w, ...)``."""
    height, width = call.get(call.grids)[0] if batch else GRIDS[1]
    call = call.put(call.grids, (height, width))
    for position in call.per_token:
        call = call.put(position, call.get(position).unflatten(0, (batch, height * width)))
    return call


class Recorder(TorchDispatchMode):
    """Keeps the calls of uhd_ops operators that reach the backends, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "uhd_ops":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


# ---- memory layouts: the same numbers, with NaN wherever nothing may be read


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every second element of a buffer, in the last dimension."""
    buffer = x.new_full((*x.shape, 2), float("nan"))
    buffer[..., 0] = x
    return buffer[..., 0]


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Inside a buffer that is larger in every dimension; the last dimension stays contiguous."""
    buffer = x.new_full(tuple(size + 3 for size in x.shape), float("nan"))
    inside = tuple(slice(1, 1 + size) for size in x.shape)
    buffer[inside] = x
    return buffer[inside]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Stored with the first two dimensions swapped, as attention heads often are."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else strided(x)


LAYOUTS = (contiguous, strided, sliced, transposed)


def in_threads(work: Callable, *arguments: Sequence) -> None:
    """Call ``work`` in as many threads as there are arguments, at once, and wait for all."""
    threads = [Thread(target=work, args=each) for each in zip(*arguments, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
