# SPDX-License-Identifier: Apache-2.0
"""Make hostile calls in child processes, and say which crashed, hung, or gave a wrong result.

Run: python -m fuzz [--public 10000] [--direct 5000] [--seed 0]
     python -m fuzz --only direct:1234     one case again, in this process
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PER_PROCESS = 500  # cases
SECONDS = 60  # for one call; the machine may be loaded
MEMORY = 4 << 30  # beyond what the libraries take
KINDS = ("public", "direct")
# What a caller expects: ours are the first three; then torch's own, numbers that fit no C type, and
# files that are not there.
EXPECTED = {
    "public": (ValueError, TypeError, NotImplementedError, RuntimeError, OverflowError, OSError),
    # Nothing is promised there but that there is an exception.
    "direct": (Exception,),
}


def load(kind: str):
    """Import what makes the cases of a kind, and fill memory that nobody writes with NaN."""
    import torch

    from fuzz import direct, public

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("ignore")
    return {"public": public, "direct": direct}[kind].case


def try_case(kind: str, make, seed: int) -> tuple[str, str]:
    """Return the outcome of one case, a word, and what there is to say about it."""
    description, check = make(seed)
    try:
        compared = check()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
        if isinstance(error, EXPECTED[kind]) and not isinstance(error, AssertionError):
            return type(error).__name__, description
        lines = str(error).strip().splitlines() or [""]
        return "wrong", f"{description}\n    {type(error).__name__}: {lines[0][:300]}"
    return "right" if compared else "accepted", description


def child(kind: str, first: int, last: int, progress: str) -> None:
    """Run some cases; the number of the one that runs is always in the file ``progress``."""
    make = load(kind)
    if not os.environ.get("UHD_OPS_SANITIZED"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcomes, findings = collections.Counter(), []
    with open(progress, "w") as file:
        for seed in range(first, last):
            file.seek(0)
            file.write(f"{seed:12d}")
            file.flush()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcome, text = try_case(kind, make, seed)
            faulthandler.cancel_dump_traceback_later()
            outcomes[outcome] += 1
            if outcome == "wrong":
                findings.append(f"{kind}:{seed} {text}")
    print(json.dumps([outcomes, findings]))


def run(kind: str, first: int, last: int) -> tuple[collections.Counter, list[str]]:
    """Run some cases in child processes, a new one after each that dies."""
    outcomes, findings = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "progress")
        command = [sys.executable, "-P", "-m", "fuzz", "--child", kind]
        end = last
        while first < end:
            words = [*command, str(first), str(last), str(progress)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                counted, wrong = json.loads(done.stdout.splitlines()[-1])
                outcomes.update(counted)
                findings += wrong
                first, last = last, end
                continue
            if not progress.exists():
                raise RuntimeError(f"no case was tried:\n{done.stderr[-3000:]}")
            died = int(progress.read_text())
            progress.unlink()
            if (
                died > first
            ):  # what this process had done is lost: again, without the one it died of
                last = died
                continue
            killed = done.returncode < 0
            what = signal.Signals(-done.returncode).name if killed else "hung, or ended the process"
            outcomes["crashed" if killed else "hung"] += 1
            findings.append(f"{kind}:{died} {what}\n{done.stderr[-2000:]}")
            first, last = died + 1, end
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--public", type=int, default=10_000, help="calls of public functions")
    parser.add_argument("--direct", type=int, default=5_000, help="calls of torch.ops.uhd_ops")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", metavar="KIND:SEED", help="run one case here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, first, last, progress = arguments.child
        child(kind, int(first), int(last), progress)
        return 0
    if arguments.only:
        kind, seed = arguments.only.split(":")
        description, check = load(kind)(int(seed))
        print(description, flush=True)
        print("compared" if check() else "accepted, not compared")
        return 0
    failed = 0
    for kind in KINDS:
        start = time.perf_counter()
        end = arguments.seed + getattr(arguments, kind)
        firsts = range(arguments.seed, end, PER_PROCESS)
        outcomes, findings = collections.Counter(), []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            lasts = [min(end, first + PER_PROCESS) for first in firsts]
            for counted, found in pool.map(run, [kind] * len(firsts), firsts, lasts):
                outcomes.update(counted)
                findings += found
        print(f"{kind}: {sum(outcomes.values())} calls in {time.perf_counter() - start:.0f} s:")
        print("   ", ", ".join(f"{name} {count}" for name, count in outcomes.most_common()))
        print("\n".join(findings), flush=True)
        failed += len(findings)
    print(f"{failed} findings" if failed else "Nothing found.")
    return 1 if failed else 0
