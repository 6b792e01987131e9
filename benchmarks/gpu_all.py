# SPDX-License-Identifier: Apache-2.0
"""Build, test, sanitize and measure on a GPU in one call; what is known is on disk after each step.

    python benchmarks/gpu_all.py --budget 560 --out DIR
    python benchmarks/gpu_all.py --rehearse --out DIR      what can be tried without a GPU

Needs nothing but what is installed: python, torch, triton, nvcc, cmake, ninja, pytest and
hypothesis; transformers for the tower, and pytest-xdist for more than one test at a time, if they
are there. What PYTHONPATH leads to is seen by every step.
DIR gets a log of each step, rows.jsonl, and results.json, which is copied to
gpu_<name>_<date>_<commit>.json, to be kept under benchmarks/results/, once something is measured.
The last lines are the table and the state of each step. The exit code is 0 unless a step failed or
overran: where there is no GPU, the steps that need one are not run, and the reason is said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, TESTS = ROOT / "build" / "gpu", ROOT / "python_tests"
# Programs of the Python that runs this, and CUDA's, are often not on PATH.
CUDA = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:{CUDA}"
# All tests that have the mark "cuda", the equality tests first; other files import what a GPU
# machine may lack.
EQUALITY = ("test_battery_values.py", "test_battery_gradients.py", "test_cuda_library.py")
OTHER_TESTS = ("test_cuda.py", "test_battery_[!vg]*.py")
# What races can be in, with its code paths: 2 x 2 and others in several warps, and windows of 2, 4,
# 8 and 16, of which the backward pass finds everything in shared memory or loads it in turn.
SHARED = ("unshuffle_norm", "linear_activation", "head size 72, bfloat16", "head size 128")
# What compute-sanitizer says where it found nothing, and, as an error, where it cannot work.
CLEAN = re.compile(r"SUMMARY: 0 ")
REFUSED = re.compile(r"not supported|unable to|not permitted|denied|insufficient|initialize", re.I)
SECONDS = "{seconds}"  # in a command: what it has, less 8 s to end by itself with whole rows
LEAST_S = 10.0  # with less left, no step is begun
BAD = ("failed", "overran")

DESCRIBE = """
import importlib.metadata, json, torch
facts = {}
for name in ("numpy", "pytest", "timm", "torch", "transformers", "triton"):
    try:
        facts[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
facts["cuda"] = torch.version.cuda
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts |= {"gpu": p.name, "capability": 10 * p.major + p.minor, "l2_bytes": p.L2_cache_size}
    facts |= {"multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory}
print(json.dumps(facts))
"""
SMOKE = """
import sys, torch, uhd_ops
x, grids = torch.randn(3, 24, 2, 64), [(4, 6)]
expected = uhd_ops.reference.window_attention(*x, grids)
torch.testing.assert_close(uhd_ops.window_attention(*x.to(sys.argv[1]), grids).cpu(), expected)
"""


def steps(
    out: Path, capability: int, rehearse: bool = False
) -> dict[str, tuple[float, list[list]]]:
    """Return the steps in the order of their value: when each must be over, and its commands.

    The time is a part of the budget; a step that is over earlier leaves its time to the others. A
    rehearsal has the same steps: it configures the build, collects the tests and measures tiny
    cases on the CPU; the driver and compute-sanitizer have nothing to do without a GPU.
    """
    build = BUILD.with_name("gpu-rehearsal") if rehearse else BUILD
    python, driver = sys.executable, build / "uhd_cuda_driver"
    # From Hopper on, the instructions that matter are in the architecture-specific set.
    arch = f"{capability}{'a' if capability >= 90 else ''}-real"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={python}"]
    configure += ["-DUHD_CUDA=ON", "-DUHD_DRIVER=ON", f"-DUHD_CUDA_ARCHS={arch}"]
    configure.append("-DUHD_LINEINFO=ON")  # what the profiler and the sanitizers point at
    make = [
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", ROOT / "uhd_ops"],
    ]
    # The project's own settings ask for plugins that may be missing here.
    pytest = [python, "-m", "pytest", "-q", "-o", "addopts=-ra --strict-markers"]
    pytest += ["-W", "ignore::pytest.PytestConfigWarning"]
    pytest += ["--collect-only"] if rehearse else ["-m", "cuda"]
    # Equality keeps one core busy with each test, and the GPU hardly; other tests time or fill it.
    at_once = []
    if importlib.util.find_spec("xdist") and not rehearse:
        at_once = ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
    bench = [python, "benchmarks/bench_gpu.py", "--out", out / "rows.jsonl", "--seconds", SECONDS]
    bench += ["--rehearse"] if rehearse else []
    host = [python, "benchmarks/bench_host.py", "--json", out / "host.json"]
    host += ["--rounds", "2"] if rehearse else ["--device", "cuda"]
    few = ("-k", "window_attention 2x2 forward +")

    def tests(globs: tuple[str, ...], options: Sequence[str] = ()) -> list:
        return [*pytest, *options, *(p for glob in globs for p in sorted(TESTS.glob(glob)))]

    def sanitize(tool: str, *names: str) -> list[list]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", driver, "--bare"]
        return [[*command, name] for name in names] if names else [command]

    planned = {
        "build": (0.34, [["nvcc", "--version"], configure, *([] if rehearse else make)]),
        "driver": (0.37, [[driver]]),
        "smoke": (0.38, [[python, "-c", SMOKE, "cpu" if rehearse else "cuda"]]),
        "equality": (0.50, [tests(EQUALITY, at_once)]),
        "key cases": (0.68, [[*bench, "--group", "key"]]),
        "host": (0.69, [host]),
        "memcheck": (0.72, sanitize("memcheck")),
        "racecheck": (0.77, sanitize("racecheck", *SHARED)),
        "initcheck": (0.80, sanitize("initcheck")),
        "synccheck": (0.83, sanitize("synccheck", *SHARED)),
        # torch.compile takes longer for a CPU, and all cases go through the same code.
        "compiled rivals": (0.91, [[*bench, "--group", "compiled", *(few if rehearse else ())]]),
        "other tests": (0.95, [tests(OTHER_TESTS)]),
        "other cases": (0.98, [[*bench, "--group", "other"]]),
    }
    if rehearse:
        without = ("driver", "memcheck", "racecheck", "initcheck", "synccheck")
        planned = {name: step for name, step in planned.items() if name not in without}
    return planned


def run(command: list, deadline: float, log: Path) -> tuple[int | None, str]:
    """Run a program, whose whole process group ends at the deadline.

    Returns:
        Its exit code, None if it was killed, and what it said.
    """
    left = max(0.0, deadline - time.monotonic())
    paths = [ROOT, ROOT / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PATH": PATH, "PYTHONPATH": ":".join(map(str, paths))}
    with log.open("a+", errors="replace") as file:
        begin, code = file.tell(), None
        process = subprocess.Popen(
            [str(word).replace(SECONDS, f"{left - 8:.0f}") for word in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(left)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(begin)
        return code, file.read().strip()


def attempt(commands: list[list], deadline: float, log: Path) -> dict[str, str]:
    """Run the commands of a step; return its status, and what was said last."""
    said = ""
    for command in commands:
        if shutil.which(command[0], path=PATH) is None:
            return {"status": "not run", "said": f"there is no {command[0]}"}
        code, text = run(command, deadline, log)
        said = text.rpartition("\n")[2]
        clean = command[0] != "compute-sanitizer" or CLEAN.search(text)
        if code == 0 and clean:
            continue
        if code is not None and not clean and (refusal := REFUSED.search(text)):
            return {"status": "not run", "said": f"compute-sanitizer: {refusal[0]}"}
        status = "overran" if code is None else "failed"
        return {"status": status, "said": f"{said} (exit code {code})", "tail": text[-4000:]}
    return {"status": "passed", "said": said}


def run_steps(planned: dict, results: dict, why_not: str, out: Path, budget: float) -> None:
    """Run what can be run, within the budget; results.json is complete after each step."""
    start, rows = time.monotonic(), out / "rows.jsonl"
    for name, (share, commands) in planned.items():
        begin = time.monotonic()
        left = start + share * budget - begin
        if why_not or left < LEAST_S:
            details = {"status": "not run", "said": why_not or f"{max(0, left):.0f} s are left"}
        else:
            print(f"== {name}: at most {left:.0f} s", flush=True)
            details = attempt(commands, begin + left, out / f"{name.replace(' ', '_')}.log")
        if name == "build" and details["status"] != "passed":
            why_not = why_not or f"build {details['status']}: {details['said']}"
        results["steps"][name] = {**details, "seconds": round(time.monotonic() - begin, 1)}
        if (host := out / "host.json").exists():
            results["host"] = json.loads(host.read_text())["rows"]
        results["rows"] = []
        for line in rows.read_text().splitlines() if rows.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # of a line that was cut off
                results["rows"].append(json.loads(line))
        write(out / "results.json", results)


def write(path: Path, results: dict) -> None:
    """Replace the file in one step: a reader finds the old content or the new one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


# ---- what it means


def merged(rows: list[dict]) -> list[dict]:
    """Return a row per case, with the rivals of all groups; a ratio is to ours of its own group."""
    cases: dict[str, dict] = {}
    for row in rows:
        first = cases.setdefault(row["case"], row)
        if "ours" in first and "ours" in row:
            rivals = {**first["rivals"], **row["rivals"]}
            spread = max(first["spread"], row["spread"])
            cases[row["case"]] = {**first, "rivals": rivals, "spread": spread}
    return list(cases.values())


def cells(row: dict) -> tuple[str, ...]:
    """Return what a table shows of a row that is measured: see HEADER."""
    ours, rivals = row["ours"], row["rivals"]
    name = min(rivals, key=lambda name: rivals[name]["ratio"], default=None)
    ratio = rivals[name]["ratio"] if rivals else 0
    # Two timings of the same thing differ by the spread, so less than that is no difference.
    lost = "ties" if 1 - ratio <= row["spread"] else "LOSES"
    times = (
        f"{ours[key]:.1f}" if key in ours else ""
        for key in ("us", "graph_us", "eager_us", "host_us")
    )
    rate = f"{row['rate']:.0f} {row['unit']}" if "rate" in row else ""
    share = f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
    rival = f"{ratio:.2f}x ({name})" if rivals else ""
    verdict = ("faster" if ratio >= 1 else lost) if rivals else "no rival"
    return (row["case"], *times, rate, share, rival, verdict)


HEADER = ("case", "us", "graph", "eager", "host", "rate", "of ceiling", "strongest rival", "")


def table(rows: list[dict]) -> str:
    """Return the table that ends a run: a line per case, columns aligned."""
    lines = [HEADER, *(cells(row) for row in merged(rows) if "ours" in row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    missing = [row for row in rows if "ours" not in row]
    return "\n".join(text + [f"{r['case']}  {r.get('error') or r['not_run']}" for r in missing])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--commit", help="of this checkout, where git is not at hand")
    parser.add_argument("--rehearse", action="store_true", help="what can be tried without a GPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's programs end too
    out, budget = options.out.resolve(), options.budget
    out.mkdir(parents=True, exist_ok=True)
    for path in (*out.glob("*.log"), out / "rows.jsonl", out / "host.json"):
        path.unlink(missing_ok=True)
    git = run(["git", "describe", "--always", "--dirty"], time.monotonic() + 20, out / "git.log")
    commit = options.commit or (git[1] if git[0] == 0 else "unknown")
    start = time.monotonic()
    found = attempt([[sys.executable, "-c", DESCRIBE]], start + 60, out / "environment.log")
    passed = found["status"] == "passed"
    facts = json.loads(found["said"]) if passed else {}
    why_not = "" if "gpu" in facts else "torch finds no CUDA device" if passed else found["said"]
    if options.rehearse:
        why_not, facts["capability"] = "" if passed else found["said"], 90
    else:
        os.environ["UHD_OPS_REQUIRE_CUDA"] = "1"
    facts |= {"commit": commit, "date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
    results = {"environment": facts, "steps": {}, "rows": []}
    planned = steps(out, facts.get("capability", 0), options.rehearse)
    run_steps(planned, results, why_not, out, budget - (time.monotonic() - start))
    if any("ours" in row for row in results["rows"]) and not options.rehearse:
        name = re.sub(r"\W+", "-", facts["gpu"].lower())
        write(out / f"gpu_{name}_{facts['date']}_{commit}.json", results)
        print(f"\n{table(results['rows'])}")
    print(f"\n{facts}")
    for name, step in results["steps"].items():
        print(f"{name:16} {step['status']:8} {step['seconds']:6.1f} s  {step['said'][:200]}")
    wrong = [name for name, step in results["steps"].items() if step["status"] in BAD]
    if options.rehearse:  # then nothing may be left out, as on a GPU machine that lacks a package
        wrong += [step for step in planned if results["steps"][step]["status"] != "passed"]
        wrong += [row["case"] for row in results["rows"] if "not_run" in row]
        print(f"not rehearsed: {', '.join(dict.fromkeys(wrong)) or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
