# SPDX-License-Identifier: Apache-2.0
"""What runs allocate, counted by torch's own allocators, the C++ included."""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(body, device):
    """Return what ``body()`` returns, and the most bytes that it held at a time on the device."""
    if device == "cpu":
        with Allocations() as allocations:
            result = body()
        return result, allocations.peak
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = body()
    return result, torch.cuda.max_memory_allocated() - before


class Allocations:
    """Counts what the body allocates on the CPU."""

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        events = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        self.sizes = [size for _, size in events]  # negative where memory is given back
        self.largest = self.peak = live = 0
        for _, size in sorted(events, key=lambda event: event[0]):
            live += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, live)


def nbytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)
