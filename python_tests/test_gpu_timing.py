# SPDX-License-Identifier: Apache-2.0
"""How the GPU benchmark times: statistics; graphs and events on a device that is made up."""

import contextlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import timing  # noqa: E402


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(226_000_000, 2), (150_000_000, 2), (7_000_000, 22), (1, 64)]
)
def test_copies_exceed_three_times_the_cache(num_bytes, expected):
    count = timing.copies_for(num_bytes, 50_000_000)
    assert count == expected
    assert count * num_bytes > 150_000_000 or count == timing.MOST_COPIES


def test_rounds_and_statistics():
    assert timing.rounds_for(0.001, 4.0) == 30
    assert timing.rounds_for(0.4, 4.0) == 10
    assert timing.rounds_for(9.0, 4.0) == 5
    assert timing.summary_of(range(1, 12)) == {"us": 6, "us_p10": 2, "us_p90": 10, "rounds": 11}
    assert timing.spread_of([10, 11, 90], [12, 12, 12]) == pytest.approx(1 / 11)


def test_time_limit_ends_a_block_and_nothing_after_it():
    message = pytest.raises(TimeoutError, match="it took longer than 0 s")
    with message, timing.time_limit(0.05, "it"):
        time.sleep(10)
    with timing.time_limit(0.05, "it"):
        pass
    time.sleep(0.1)


# ---- timing on a device that is made up


class FakeDevice:
    """As much of torch.cuda as CudaTimer uses; a call takes a millisecond of its clock."""

    def __init__(self, refuses=False):
        self.now, self.refuses, self.recorded, self.replays = 0.0, refuses, [], 0
        self.current = None

    def call(self):
        self.now += 1.0
        self.recorded.append(self.current)
        return torch.ones(1)

    def install(self, monkeypatch):
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                device.replays += 1
                device.now += self.cost

        @contextlib.contextmanager
        def graph(made, stream):
            if device.refuses:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            before = device.now
            yield
            made.cost, device.now = device.now - before, before

        @contextlib.contextmanager
        def stream(chosen):
            device.current = chosen
            yield
            device.current = None

        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream}
        fakes |= {"Stream": lambda: "side", "synchronize": lambda: None}
        fakes |= {"get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50)}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return self


@pytest.mark.parametrize(("copies", "calls"), [(2, 20), (22, 22)])
def test_a_graph_holds_every_copy(monkeypatch, copies, calls):
    device = FakeDevice().install(monkeypatch)
    with timing.CudaTimer() as timer:
        sample, method = timer.prepare([device.call] * copies)
        assert method == "graph"
        assert timer.l2_bytes == 50
        assert sample() == 1000.0  # microseconds per call
    assert len(device.recorded) == calls
    assert set(device.recorded) == {"side"}
    assert device.replays == 2  # once to warm up
    assert device.current is None


def test_a_refused_capture_is_timed_by_events(monkeypatch):
    device = FakeDevice(refuses=True).install(monkeypatch)
    with timing.CudaTimer() as timer:
        sample, method = timer.prepare([device.call] * 3)
        assert method == "events: capture refused, operation not permitted"
        assert sample() == 1000.0
    assert len(device.recorded) == 20
    assert device.replays == 0
