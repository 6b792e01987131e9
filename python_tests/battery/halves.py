# SPDX-License-Identifier: Apache-2.0
"""Conversions between float32 and half types: those of a program under test, and torch's.

``run("widen", kind)`` writes all 65536 halves as floats; ``run("narrow", kind, stdin=floats)``
writes what it read as halves.
"""

import torch

HALVES = {"half": torch.float16, "bf16": torch.bfloat16}


def check_widening(run, kind):
    wanted = torch.arange(65536).to(torch.uint16).view(HALVES[kind]).float()
    got = torch.frombuffer(bytearray(run("widen", kind)), dtype=torch.float32)
    assert torch.equal(got.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(got.view(torch.int32)[number], wanted.view(torch.int32)[number])


def check_rounding(run, kind):
    dtype = HALVES[kind]
    every = torch.arange(65536).to(torch.uint16).view(dtype).float()
    # Each half itself; half-way to its neighbour, and one bit to either side: where rounding goes
    # wrong. The spacing in the subnormal range is fixed instead.
    middle = every.view(torch.int32) + (1 << (12 if dtype == torch.float16 else 15))
    near = torch.cat([middle + offset for offset in (-1, 0, 1)]).view(torch.float32)
    tiny = (torch.arange(4096) * torch.finfo(dtype).smallest_normal / 2048).float()
    beside = [torch.nextafter(tiny, torch.tensor(limit)) for limit in (0.0, 1.0)]
    generator = torch.Generator().manual_seed(0)
    low, high = -(1 << 31), (1 << 31) - 1
    anything = torch.randint(low, high, (2_000_000,), generator=generator).to(torch.int32)
    floats = torch.cat([every, near, tiny, -tiny, *beside, anything.view(torch.float32)])

    data = run("narrow", kind, stdin=floats.numpy().tobytes())
    got = torch.frombuffer(bytearray(data), dtype=torch.int16)
    wanted = floats.to(dtype)
    assert torch.equal(got.view(dtype).isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(got[number], wanted.view(torch.int16)[number])
