# SPDX-License-Identifier: Apache-2.0
"""Hostile calls of ``torch.ops.uhd_ops.*``, below every check in Python."""

from __future__ import annotations

import functools
import random

import torch
from battery import NATIVE, assert_same_bits, make_call, option_cases, public
from battery.calls import Recorder, gradients

from fuzz.hostile import HUGE, INTEGERS, spoil_tensor
from fuzz.public import FLOATS, is_real
from uhd_ops import reference

_TORCH_COMPUTES = ("_linear_activation", "_view_attention")
_STRINGS = ("", "gelu", "average", "\0", "block_diagonal", "x" * 1000)


@functools.cache
def good_calls() -> dict[str, list[tuple]]:
    """Return, for every operator that public functions reach, arguments that they pass."""
    found = {}
    rotary = {"rotary": (torch.randn(39, 8), torch.randn(39, 8))}
    cases = [(name, options, {}) for name in NATIVE for options in option_cases(name)]
    cases += [("window_attention", {}, rotary), ("window_attention_qkvpacked", {}, rotary)]
    for name, options, more in cases:
        call = make_call(name, **options)
        for key, value in more.items():
            call = call.put(key, value)
        with Recorder() as recorder:
            gradients(public(name), call)
        for function, args, _ in recorder.calls:
            found.setdefault(function, []).append(args)
    return {str(function): (function, calls) for function, calls in found.items()}


def _spoil_views(views: torch.Tensor, rng: random.Random) -> torch.Tensor:
    views = views.clone()
    for _ in range(rng.choice((1, 1, 2))):
        row, column = rng.randrange(views.shape[0]), rng.randrange(views.shape[1])
        views[row, column] = rng.choice((*INTEGERS, int(views[row, column]) + 1))
    if rng.random() < 0.3:  # a table that continues where a wrapped product would end
        side = rng.choice(HUGE)
        views = torch.tensor([[0, side, side, 0], [side * side % 2**63, 0, 0, 0]])
    return views


def _spoiled(value: object, rng: random.Random) -> tuple[str, object]:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.int64 and value.dim() == 2 and rng.random() < 0.7:
            return "table", _spoil_views(value, rng)
        return spoil_tensor(value, rng)
    if isinstance(value, bool):
        return "other flag", not value
    if isinstance(value, int):
        return "integer", rng.choice((*INTEGERS, value + 1, value - 1, value * 2))
    if isinstance(value, float):
        return "number", rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
    if isinstance(value, str):
        return "string", rng.choice(_STRINGS)
    if isinstance(value, (list, tuple)):
        return "list", rng.choice(([], [rng.choice(INTEGERS)] * rng.randrange(1, 6), [*value, 1]))
    return "instead of nothing", torch.ones(3)


def _tame(value: object) -> object:
    return value.detach().resolve_neg().clone().contiguous() if _is_tensor(value) else value


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _grids(views: torch.Tensor) -> list[tuple[int, int]]:
    return [(height, width) for _, height, width, _ in views.tolist()[:-1]]


def _padded(out: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([out, out.new_zeros(rows - len(out), *out.shape[1:])])


def _windows(function, x, *more, views, window, rows):
    grids = _grids(views)
    tokens = sum(h * w for h, w in grids)
    return _padded(function(x[:tokens], *(y[:tokens] for y in more), grids, window), rows)


DEFINITIONS = {
    "uhd_ops.window_mean.default": lambda x, views, window, rows: _windows(
        reference.window_mean, x, views=views, window=window, rows=rows
    ),
    "uhd_ops.pixel_unshuffle.default": lambda x, views, factor, rows: _windows(
        reference.pixel_unshuffle, x, views=views, window=factor, rows=rows
    ),
    "uhd_ops.window_pool.default": lambda x, logits, views, window, rows: _windows(
        reference.window_pool, x, logits, views=views, window=window, rows=rows
    ),
    "uhd_ops.tile_weight.default": lambda weight, tiles, mode: {
        "block_diagonal": reference.tile_block_diagonal,
        "average": reference.tile_average,
        "repeat": reference.tile_vector,
    }[mode](weight, tiles),
}
"""Of the operators that say by their arguments alone what comes out."""


def _tensors(out: object) -> list[torch.Tensor]:
    return [out] if _is_tensor(out) else [x for x in out if _is_tensor(x)]


def case(seed: int) -> tuple[str, object]:
    """Return the description and the check of one case."""
    rng = random.Random(seed)
    name = rng.choice(sorted(good_calls()))
    function, calls = good_calls()[name]
    args, done = list(rng.choice(calls)), []
    for place in rng.sample(range(len(args)), min(len(args), rng.choice((1, 1, 2, 3)))):
        what, args[place] = _spoiled(args[place], rng)
        done.append(f"{place}: {what}")

    def check() -> bool:
        out = _tensors(function(*args))
        if not is_real(*out, *args):
            return False
        tame = [_tame(x) for x in args]
        again = _tensors(function(*tame))
        finite = "number" not in str(done) and all(
            bool(torch.isfinite(x.double()).all()) for x in tame if _is_tensor(x)
        )
        computed_by_torch = any(part in name for part in _TORCH_COMPUTES)
        for made, wanted in zip(out, again, strict=True):
            assert made.shape == wanted.shape
            if made.is_floating_point() and finite:
                # Memory that is not written holds NaN here.
                assert bool(torch.isfinite(made).all()), "not finite"
            if made.dtype in FLOATS and not computed_by_torch:
                assert_same_bits(made.detach(), wanted.detach())
        if name in DEFINITIONS and finite:
            exact = DEFINITIONS[name](*(x.double() if _floats(x) else x for x in tame))
            eps = torch.finfo(out[0].dtype).eps
            torch.testing.assert_close(out[0].double(), exact, rtol=32 * eps, atol=32 * eps)
        return True

    return f"{name} {done}", check


def _floats(value: object) -> bool:
    return _is_tensor(value) and value.is_floating_point()
