# SPDX-License-Identifier: Apache-2.0
"""Signals, worker processes, and very many calls: what a long training run does to operators."""

import gc
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from battery import assert_same_bits, gradients, make_call, public, run
from battery.marks import native_only
from torch.utils.data import DataLoader, Dataset

import uhd_ops

LARGE = [(512, 512)]
LONG = {
    "mean": lambda call: uhd_ops.window_mean(*call.args),
    "gradients": lambda call: gradients(uhd_ops.window_mean, call)[1][0],
}


@native_only("there it is torch that is interrupted")
@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_ends_a_call_and_spoils_nothing(name):
    call = make_call("window_mean", grids=LARGE)
    wanted = LONG[name](call)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers are deaf
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))

    def work():
        for _ in range(100_000):  # minutes
            LONG[name](call)

    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert_same_bits(LONG[name](call), wanted)


class Sizes(Dataset):
    """Images by their sizes: a plan, and what operators make of random tokens of its views."""

    OPS = ("window_attention", "window_pool", "pixel_unshuffle", "reorder_tokens")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        plan = uhd_ops.plan_slices(300 + 500 * index, 700, scale_resolution=112)
        grids = uhd_ops.PackedGrids(plan.grids)
        # No gradients: once autograd has had threads, torch refuses it in a fork.
        calls = {name: make_call(name, grids=grids, seed=index) for name in self.OPS}
        return [plan.to_dict(), *(run(public(name), call) for name, call in calls.items())]


# An interpreter that starts anew takes seconds.
STARTS = ["fork", *(pytest.param(how, marks=pytest.mark.slow) for how in ("spawn", "forkserver"))]


@pytest.mark.parametrize("start", STARTS)
def test_workers_of_a_data_loader(start):
    sizes = Sizes()
    wanted = [sizes[index] for index in range(len(sizes))]  # so that a fork inherits used tables
    workers = DataLoader(
        sizes, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120
    )
    for (plan, *made), (wanted_plan, *expected) in zip(workers, wanted, strict=True):
        assert plan == wanted_plan
        for tensor, right in zip(made, expected, strict=True):
            assert_same_bits(tensor, right)


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_flat_over_calls_with_new_grids():
    x = torch.randn(200, 8)
    before = uhd_ops.set_cache_limit(2**21)

    def step(index):
        grids = [tuple(1 + index // 7**n % 7 for n in (k, k + 1)) for k in (0, 2, 4)]
        tokens = x[: sum(height * width for height, width in grids)]
        tokens.requires_grad_(index % 16 == 0)
        if index % 8 == 0:
            out = uhd_ops.window_attention(*[tokens.view(-1, 2, 4)] * 3, grids, 3)
        elif index % 8 == 1:
            out = uhd_ops.reorder_tokens(tokens, grids, "block")
        elif index % 2:
            out = uhd_ops.pixel_unshuffle(tokens, grids)
        else:
            out = uhd_ops.window_pool(tokens, tokens, grids)
        if out.requires_grad:
            out.sum().backward()

    try:
        for index in range(20_000):  # until what is kept has come to its limit
            step(index)
        start = resident_bytes()
        for index in range(20_000, 100_000):
            step(index)
        grown = resident_bytes() - start
    finally:
        uhd_ops.set_cache_limit(before)
        uhd_ops.clear_caches()
    assert grown < 80_000 * 50  # fewer bytes for a call than any object of Python has
