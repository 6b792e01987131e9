# SPDX-License-Identifier: Apache-2.0
"""Arguments that nobody should pass, made from good ones."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1)
"""Sizes that overflow once they are multiplied."""

INTEGERS = (0, -1, 1, 2, 3, 5, 7, 1000, *HUGE, -(2**31), -(2**63))
OBJECTS = (None, True, False, 1.5, math.nan, math.inf, "2", b"2", (), [2], {2: 3}, object(), 2**64)
NUMBERS = (
    *INTEGERS,
    *OBJECTS,
    -(2**64),
    1e308,
    2 + 0j,
    np.int64(2),
    np.float32(2),
    torch.tensor(2),
)

_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32),
    *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn),
)


class Subclass(torch.Tensor):
    """A tensor that differs from others in its type alone."""


def _planted(value: float):
    def plant(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
        x = x.clone()
        if x.numel():
            x.view(-1)[rng.randrange(x.numel())] = value
        return x

    return plant


def _strided(x, rng):
    buffer = x.new_empty((*x.shape, 3)).fill_(float("nan") if x.is_floating_point() else 1)
    buffer[..., rng.randrange(3)] = x
    return buffer[..., 0] if rng.random() < 0.2 else buffer.copy_(x[..., None])[..., 1]


def _misaligned(x, rng):
    buffer = torch.zeros(x.numel() + 8, dtype=x.dtype)
    start = rng.randrange(1, 8)
    return buffer[start : start + x.numel()].copy_(x.flatten()).view(x.shape)


def _swapped(x, rng):
    dims = rng.sample(range(x.dim()), x.dim())
    return x.permute(dims).contiguous().permute([dims.index(i) for i in range(x.dim())])


def _fake(x, rng):
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


def _quantized(x, rng):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


TENSOR_SPOILERS = {
    # The same values, laid out or wrapped otherwise: most of these calls are legal.
    "strided": _strided,
    "misaligned": _misaligned,
    "swapped": _swapped,
    "offset": lambda x, rng: torch.cat([x[:1], x])[1:],
    "expanded": lambda x, rng: x[:1].expand_as(x),
    "overlapping": lambda x, rng: x.flatten().as_strided(x.shape, [1] * x.dim()),
    "negated": lambda x, rng: torch._neg_view(-x),
    "zeros": lambda x, rng: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "parameter": lambda x, rng: torch.nn.Parameter(x, requires_grad=rng.random() < 0.5),
    "subclass": lambda x, rng: x.clone().as_subclass(Subclass),
    "inference": lambda x, rng: _inference(x),
    "nan": _planted(math.nan),
    "infinity": _planted(math.inf),
    "subnormal": _planted(1e-41),
    # Others.
    "dtype": lambda x, rng: x.to(rng.choice(_DTYPES)),
    "meta": lambda x, rng: x.to("meta"),
    "fake": _fake,
    "sparse": lambda x, rng: x.to_sparse(),
    "csr": lambda x, rng: x.flatten(1).to_sparse_csr(),
    "mkldnn": lambda x, rng: x.float().to_mkldnn(),
    "quantized": _quantized,
    "nested": lambda x, rng: torch.nested.as_nested_tensor([x, x], layout=torch.jagged),
    "no rows": lambda x, rng: x[:0],
    "no channels": lambda x, rng: x[..., :0],
    "one row": lambda x, rng: x[:1],
    "a row less": lambda x, rng: x[:-1],
    "a row more": lambda x, rng: torch.cat([x, x[:1]]),
    "a channel less": lambda x, rng: x[..., 1:],
    "another dimension": lambda x, rng: x.unsqueeze(rng.randrange(x.dim() + 1)),
    "a dimension less": lambda x, rng: x.flatten(0, 1) if x.dim() > 1 else x.sum(),
    "scalar": lambda x, rng: x.sum(),
    "endless": lambda x, rng: x[:1].expand(2**40, *x.shape[1:]),
    "wide": lambda x, rng: x[..., :1].expand(*x.shape[:-1], 2**40),
    "array": lambda x, rng: x.float().numpy(),
    "list": lambda x, rng: x.tolist(),
    "object": lambda x, rng: rng.choice(OBJECTS),
}


def _inference(x):
    with torch.inference_mode():
        return x.clone()


def spoil_tensor(x: torch.Tensor, rng: random.Random) -> tuple[str, object]:
    """Return the name of what was done to a tensor, and the result."""
    name = rng.choice(list(TENSOR_SPOILERS))
    if x.numel() > 2**20:
        return "same", x  # an endless one, of which nothing can be made in time
    try:
        return name, TENSOR_SPOILERS[name](x, rng)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return "same", x  # torch does not make such a tensor of this one


def spoil_grids(pairs: list[tuple[int, int]], rng: random.Random) -> object:
    """Return other grids, of which some are legal."""
    tokens = sum(h * w for h, w in pairs)
    side = rng.choice(INTEGERS)
    choices = (
        lambda: [*pairs, (0, 0)],
        lambda: pairs[::-1],
        lambda: [(1, tokens)],
        lambda: (tokens, 1),
        lambda: [(side, rng.choice(INTEGERS))],
        lambda: [*pairs, (side, 0)],
        lambda: [(2**32, 2**32), *pairs],
        lambda: torch.tensor(pairs),
        lambda: torch.tensor(pairs, dtype=torch.int32),
        lambda: torch.tensor(pairs, dtype=torch.float64),
        lambda: torch.tensor(pairs, device="meta"),
        lambda: np.array(pairs),
        lambda: np.array(pairs, dtype=np.uint8),
        lambda: [(h, w, 1) for h, w in pairs],
        lambda: [(float(h), w) for h, w in pairs],
        lambda: [[str(h), w] for h, w in pairs],
        lambda: iter(pairs),
        lambda: dict(pairs),
        lambda: [(1, 1)] * tokens,
        lambda: [],
        lambda: rng.choice(OBJECTS),
    )
    try:
        return rng.choice(choices)()
    except (RuntimeError, OverflowError):
        return pairs  # sides that no such array holds
