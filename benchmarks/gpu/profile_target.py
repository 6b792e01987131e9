# SPDX-License-Identifier: Apache-2.0
"""Run our operator once for each main case between the marks that a profiler listens to."""

from __future__ import annotations

import torch

from gpu import measure, problems
from gpu.cases import ATTENTION, BACKWARD, DENSE, FORWARD, NORM, TIED, Case

CASES = (
    Case(ATTENTION, FORWARD),
    Case(ATTENTION, BACKWARD),
    Case(NORM, FORWARD),
    Case(NORM, BACKWARD),
    Case(ATTENTION, FORWARD, window=8),
    Case(ATTENTION, BACKWARD, window=8),
    Case(TIED, FORWARD),
    Case(ATTENTION, FORWARD, window=16),
    Case(DENSE, FORWARD),
)


def main() -> None:
    device = torch.device("cuda", 0)
    for case in CASES:
        tensors = problems.inputs(case, device, seed=0)
        call = measure.call_of(case, problems.ours(case, device), tensors, seed=0)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
