# SPDX-License-Identifier: Apache-2.0
"""Time calls on a GPU by replaying CUDA graphs, or on the host for a rehearsal without one."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

CALLS_PER_GRAPH = 20
MOST_ROUNDS, FEWEST_ROUNDS = 30, 5
MOST_COPIES = 64

Call = Callable[[], object]


def copies_for(num_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs make the cache useless: together more than three times its size."""
    return min(MOST_COPIES, max(2, math.floor(3 * l2_bytes / max(1, num_bytes)) + 1))


def rounds_for(seconds_per_round: float, seconds: float) -> int:
    """How many rounds fit in the time that one case may take."""
    fitting = int(seconds / max(seconds_per_round, 1e-9))
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, fitting))


def summary_of(samples: Sequence[float]) -> dict[str, float]:
    """Return median and the 10th and 90th percentile, in microseconds."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "us": round(statistics.median(samples), 3),
        "us_p10": round(tenths[0], 3),
        "us_p90": round(tenths[-1], 3),
        "rounds": len(samples),
    }


def spread_of(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how far two timings of the same thing are apart, as a part of the smaller one."""
    a, b = statistics.median(first), statistics.median(second)
    return abs(a - b) / min(a, b)


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in this block after ``seconds``. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("time_limit works in the main thread only")

    def end(*_: object) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class HostTimer:
    """For a rehearsal on the CPU: the same interface, times that mean nothing."""

    l2_bytes = 1 << 20

    def __enter__(self) -> HostTimer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        def sample() -> float:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e6

        return sample, "host clock"


class CudaTimer:
    """Times on one side stream, on which everything that is captured has run before.

    Autograd runs a backward pass on the stream of its forward pass; were that another stream than
    the one that captures, the capture would be refused.
    """

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._stream = torch.cuda.Stream()

    def __enter__(self) -> CudaTimer:
        torch.cuda.synchronize()
        self._scope = torch.cuda.stream(self._stream)
        self._scope.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._scope.__exit__(*details)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, call: Call) -> int:
        """Memory that one call takes beyond what was there before, its result included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """Return a function that times ``calls`` in turn, and how it does that.

        Args:
            calls: The same work on different inputs; each ran at least once.

        Returns:
            ``sample()``, which returns microseconds per call, and "graph" or "events: <why>".
        """
        count = max(CALLS_PER_GRAPH, len(calls))
        try:
            graph = self._capture(calls, count)
        except (RuntimeError, AssertionError) as error:
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[:1]
            return (
                lambda: self._elapsed(lambda: self._run(calls, count)) / count,
                f"events: capture refused, {reason[0] if reason else type(error).__name__}",
            )
        graph.replay()
        return lambda: self._elapsed(graph.replay) / count, "graph"

    def _capture(self, calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._run(calls, count)
        return graph

    @staticmethod
    def _run(calls: Sequence[Call], count: int) -> None:
        # Results stay for one turn, so that they rotate through memory as the inputs do.
        kept: deque = deque(maxlen=len(calls))
        for i in range(count):
            kept.append(calls[i % len(calls)]())

    def _elapsed(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
