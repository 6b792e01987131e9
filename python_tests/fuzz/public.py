# SPDX-License-Identifier: Apache-2.0
"""Hostile calls of public functions and modules, judged by the definitions."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from battery import assert_close, assert_gradients_close, expected, public, run
from battery.calls import gradients, random_like
from specs import SPECS, Call

import uhd_ops
from fuzz.hostile import NUMBERS, OBJECTS, spoil_grids, spoil_tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_grids(rng: random.Random) -> list[tuple[int, int]]:
    return [(rng.randrange(9), rng.randrange(9)) for _ in range(rng.randrange(1, 5))]


def random_call(name: str, rng: random.Random) -> Call:
    """Return a good call, with any options that go together or not."""
    spec = SPECS[name]
    options = {
        option: rng.choice(values) for option, values in spec.options.items() if rng.random() < 0.3
    }
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    return spec.make(random_grids(rng), rng.choice(FLOATS), generator=generator, **options)


def spoil(call: Call, rng: random.Random) -> tuple[Call, list[str]]:
    """Return the call with up to three hostile arguments, and what they are."""
    keys, done = [*range(len(call.args)), *call.kwargs], []
    for key in rng.sample(keys, min(len(keys), rng.choice((0, 1, 1, 1, 2, 3)))):
        value = call.get(key)
        if key == call.grids:
            what, value = "grids", spoil_grids(value, rng)
        elif isinstance(value, torch.Tensor):
            what, value = spoil_tensor(value, rng)
        else:
            what = f"{key}"
            value = rng.choice(NUMBERS)
        call = call.put(key, value)
        done.append(f"{key}: {what}")
    if rng.random() < 0.05:
        name = rng.choice(("scale", "out", "window ", "order", "eps"))
        call = call.put(name, rng.choice(OBJECTS))
        done.append(f"another keyword {name!r}")
    return call, done


def _plain(x: object) -> object:
    """Return a tensor as the definition takes it: dense, without a class or a gradient."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().as_subclass(torch.Tensor).resolve_neg().contiguous()


def is_real(*values: object) -> bool:
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    fake = torch._subclasses.fake_tensor.FakeTensor
    return not any(x.is_meta or isinstance(x, fake) for x in tensors)


def _has_elements(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 0


def _finite(call: Call) -> bool:
    values = [call.get(key) for key in (*range(len(call.args)), *call.kwargs)]
    return all(
        bool(torch.isfinite(x).all())
        for x in values
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    )


def operator_case(rng: random.Random) -> tuple[str, object]:
    """Return what is called, and a function that calls it and checks the result."""
    name = rng.choice(sorted(SPECS))
    call, done = spoil(random_call(name, rng), rng)
    leaves = [call.get(key) for key in call.differentiable]
    backward = rng.random() < 0.3 and all(isinstance(x, torch.Tensor) for x in leaves)

    def check() -> bool:
        out, grads = gradients(public(name), call) if backward else (run(public(name), call), None)
        if not is_real(out, *call.args, *call.kwargs.values()):
            return False
        plain = call
        for key in (*range(len(call.args)), *call.kwargs):
            plain = plain.put(key, _plain(call.get(key)))
        exact = plain.exact()
        if not _finite(exact):
            # Where a NaN or an infinity goes is the battery's; here, that shapes are right.
            assert out.shape == run(expected(name), exact).shape
            return False
        if grads is None:
            assert_close(SPECS[name], plain, out.detach(), run(expected(name), exact))
            return True
        wanted, wanted_grads = gradients(expected(name), exact, random_like(out))
        assert_close(SPECS[name], plain, out, wanted)
        # Where tokens are all alike, whole gradients cancel: rounding is of what they add up.
        size = max([1.0, *(x.abs().max().item() for x in exact.args if _has_elements(x))])
        spec = replace(SPECS[name], scale=lambda _: size**2)
        assert_gradients_close(spec, plain, grads, wanted_grads)
        return True

    return f"{name} {done or 'as it is'}{', backward' if backward else ''}", check


def _modules(dim: int, dtype: torch.dtype, rng: random.Random):
    nn = uhd_ops.nn
    make = rng.choice(
        [
            lambda: nn.EarlyCompressor(dim, 2, form=rng.choice(("dense", "block", "tied"))),
            lambda: nn.EarlyCompressor(dim, 2, attention=rng.choice(("none", "cross_mean"))),
            lambda: nn.EarlyCompressor(dim, 2, mlp=rng.choice(("plain", "none"))),
            lambda: nn.WindowTokenCompressor(dim, pool=rng.choice(("adaptive", "mean"))),
            lambda: nn.PixelUnshuffleConnector(dim, 12, merger_times=rng.choice((1, 2))),
            lambda: nn.QueryResampler(dim, 12, num_queries=4, num_heads=2),
        ]
    )
    return make().to(dtype)


def module_case(rng: random.Random) -> tuple[str, object]:
    """Modules: in float64 they must equal themselves on the definitions."""
    torch.manual_seed(rng.randrange(2**32))
    pairs = random_grids(rng)
    module = _modules(8, torch.float64, rng).eval()
    x = torch.randn(sum(h * w for h, w in pairs), 8, dtype=torch.float64)
    what, grids = [], pairs
    if rng.random() < 0.8:
        name, x = spoil_tensor(x, rng)
        what.append(name)
    if rng.random() < 0.4:
        what.append("grids")
        grids = spoil_grids(pairs, rng)

    def check() -> bool:
        again = list(grids) if hasattr(grids, "__next__") else grids
        out = module(x, again)
        if not is_real(out, x):
            return False
        with uhd_ops.definitions():
            wanted = module(_plain(x), again)
        scale = wanted.abs().nan_to_num().max().item() if wanted.numel() else 0.0
        # Some thousand roundings of numbers of size one, and no more than the result's own size.
        allowed = 1e4 * torch.finfo(out.dtype).eps * max(scale, 1.0)
        torch.testing.assert_close(out, wanted, rtol=0, atol=allowed, equal_nan=True)
        return True

    return f"{type(module).__name__} {what}", check


def _good_arguments(rng: random.Random) -> dict:
    """Return good arguments of functions that plan and pack, and what holds for their results."""
    width, height = rng.randrange(1, 3000), rng.randrange(1, 3000)
    pairs = random_grids(rng)

    return {
        "plan_slices": (
            (width, height),
            {"max_slices": 9, "scale_resolution": 448, "patch_size": 14, "overlap": 0},
            lambda plan: plan.num_views >= 1 and plan.num_tokens >= 1,
        ),
        "plan_slices_batch": (
            ([width, 5], [height, 7]),
            {"max_slices": 9, "scale_resolution": 448, "patch_size": 14, "merge": 4},
            lambda rows: bool((rows["num_tokens"] >= 1).all()),
        ),
        "pack_batches": (
            ([rng.randrange(1, 50) for _ in range(5)], 60),
            {},
            lambda batches: all(batches),
        ),
        "PackedGrids": (
            (pairs,),
            {},
            lambda grids: len(repr(grids)) > 0 and grids.num_tokens >= 0,
        ),
        "PaddedGrids": (
            (64, 4),
            {"windows": (2,), "device": "cpu"},
            lambda grids: len(repr(grids)) > 0,
        ),
        "set_cache_limit": ((1 << 20,), {}, lambda _: True),
        "pack_views": (
            ([torch.rand(3, 28, 28)],),
            {"patch_size": 14, "mean": 0.5, "std": 0.5},
            lambda made: made[0].shape[0] == made[1].num_tokens,
        ),
    }


def planner_case(rng: random.Random) -> tuple[str, object]:
    """Functions without a definition: refused, or a result that holds together."""
    good = _good_arguments(rng)
    name = rng.choice(sorted(good))
    args, kwargs, holds = good[name]
    args, kwargs = list(args), dict(kwargs)
    spoiled = []
    keys = [*range(len(args)), *kwargs]
    for key in rng.sample(keys, min(len(keys), rng.choice((1, 1, 2)))):
        value = args[key] if isinstance(key, int) else kwargs[key]
        if name == "PackedGrids":
            value = spoil_grids(value, rng)
        elif isinstance(value, list) and value and rng.random() < 0.5:
            value = [*value[:-1], rng.choice(NUMBERS)]
        else:
            value = rng.choice(NUMBERS)
        spoiled.append(f"{key}={value!r}")
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value

    def check() -> bool:
        try:
            out = getattr(uhd_ops, name)(*args, **kwargs)
        finally:
            uhd_ops.set_cache_limit(256 << 20)
        assert holds(out)
        return True

    return f"{name} {', '.join(spoiled)}"[:300], check


def case(seed: int) -> tuple[str, object]:
    """Return the description and the check of one case."""
    rng = random.Random(seed)
    kinds = (operator_case, module_case, planner_case)
    return rng.choices(kinds, weights=(6, 2, 2))[0](rng)
