# SPDX-License-Identifier: Apache-2.0
"""What each stage does: it starts a program, reads what it printed, and says what came of it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu import processes
from gpu.environment import find_tool
from gpu.stages import Details, FailedError, NotRunError, OverranError

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "gpu"
DRIVER = "uhd_cuda_driver"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What the sanitizer says where it cannot work: an old or virtualised driver, a locked-down machine.
# Findings of its own begin with "Error:" too, so the words decide.
REFUSALS = re.compile(
    r"=+ *(?:internal sanitizer error|error: .*(?:not supported|unable to|not permitted|denied"
    r"|insufficient|failed to initialize|initialization failed))",
    re.IGNORECASE,
)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Workplace:
    """Where one call runs and what it knows of the machine."""

    out: Path
    environment: Details  # filled by the first stage

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    def run(
        self,
        *command: str | Path,
        seconds: float,
        variables: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> processes.Outcome:
        """Run a program in the checkout, with the checkout's packages importable."""
        # cmake and ninja may be programs of the Python that runs this, whose folder is not on PATH.
        folders = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "PATH": folders}
        return processes.run(
            command,
            seconds=seconds,
            log=self.log,
            environment={**paths, **(variables or {})},
            directory=ROOT,
            quiet=quiet,
        )

    def run_checked(self, what: str, *command: str | Path, **options) -> processes.Outcome:
        """Run a program that must succeed; on failure its last lines are the details."""
        done = self.run(*command, **options)
        if done.overran:
            raise OverranError(f"{what} was killed after {done.seconds:.0f} s", tail=done.tail())
        if done.returncode != 0:
            if options.get("quiet"):
                print(done.tail(), flush=True)
            raise FailedError(f"{what} ended with exit code {done.returncode}", tail=done.tail())
        return done


def no_gpu(stages: Mapping[str, Details]) -> str | None:
    """Why nothing can run on a GPU here, or None."""
    environment = stages.get("environment", {})
    if environment.get("gpu"):
        return None
    return str(environment.get("why_no_gpu") or "the environment is unknown")


def architecture(capability: Sequence[int]) -> str:
    """Return the one architecture to compile for, as CMake names it."""
    major, minor = capability
    # From Hopper on, the instructions that matter are in the architecture-specific set.
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def last_json(lines: Sequence[str]) -> Details:
    """Read the line that a program of ours ends with; a library may print warnings after it."""
    line = next((line for line in reversed(lines) if line.startswith("{")), None)
    if line is None:
        raise FailedError("the program printed no result", tail="\n".join(lines[-40:]))
    return json.loads(line)


def environment(place: Workplace, seconds: float) -> Details:
    done = place.run_checked(
        "reading the environment", sys.executable, "-m", "gpu.environment", seconds=seconds
    )
    place.environment.update(last_json(done.lines))
    return dict(place.environment)


def ceilings(place: Workplace, seconds: float) -> Details:
    command = (sys.executable, "-m", "gpu.ceilings")
    return last_json(place.run_checked("measuring", *command, seconds=seconds).lines)


def build(place: Workplace, seconds: float) -> Details:
    nvcc = place.environment["tools"]["nvcc"]
    if nvcc is None:
        raise NotRunError("no nvcc was found")
    arch = architecture(place.environment["gpu"]["compute_capability"])
    variables = {
        "UHD_OPS_REQUIRE_NATIVE": "1",
        "UHD_OPS_CUDA": "1",
        "UHD_OPS_CUDA_ARCHS": arch,
        "UHD_OPS_BUILD_DIR": str(BUILD),
        "CUDACXX": nvcc,
    }
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    place.run_checked("the build", *command, seconds=seconds, variables=variables, quiet=True)
    return {"archs": arch}


def smoke(place: Workplace, seconds: float) -> Details:
    """Build the driver, which has no torch in it, and run every kernel once."""
    deadline = time.monotonic() + seconds

    def step(what: str, *command: str | Path, quiet: bool) -> processes.Outcome:
        left = deadline - time.monotonic()
        return place.run_checked(what, *command, seconds=left, quiet=quiet)

    step("configuring", "cmake", "-S", ROOT, "-B", BUILD, "-DUHD_DRIVER=ON", quiet=True)
    step("building", "cmake", "--build", BUILD, "--target", DRIVER, "-j", quiet=True)
    driver = _driver()
    if driver is None:
        raise FailedError(f"{DRIVER} was built, but is not under {BUILD.relative_to(ROOT)}")
    last = (step("the driver", driver, quiet=False).lines or [""])[-1]
    if not re.fullmatch(r"all \d+ checks passed", last):
        raise FailedError(f"the driver's last line is {last!r}, not 'all N checks passed'")
    return {"said": last}


def _driver() -> Path | None:
    return next((path for path in BUILD.rglob(DRIVER) if path.is_file()), None)


def pytest_counts(lines: Sequence[str]) -> dict[str, int]:
    """Read ``{"passed": 12, "failed": 1, ...}`` from pytest's last line."""
    for line in reversed(lines):
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", line)
        if found:
            return {name.removesuffix("s"): int(count) for count, name in found}
    return {}


def tests(place: Workplace, seconds: float) -> Details:
    command = [sys.executable, "-m", "pytest", "python_tests", "-m", "cuda", "-q"]
    # The project's own settings ask for the plugin that ends slow tests; where that is missing, the
    # deadline of this stage does it.
    command += ["-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider"]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]
    # It reads the list of files from git, which a copy of the checkout may not have.
    command += ["--ignore=python_tests/test_architecture.py"]
    done = place.run(*command, seconds=seconds, variables={"UHD_OPS_REQUIRE_CUDA": "1"})
    counts = pytest_counts(done.lines)
    if done.overran:
        raise OverranError(f"killed after {done.seconds:.0f} s", tail=done.tail(), counts=counts)
    if done.returncode != 0 or not counts.get("passed"):
        reason = "no test ran" if not counts.get("passed") else "tests failed"
        raise FailedError(
            f"{reason} (exit code {done.returncode})", tail=done.tail(), counts=counts
        )
    return {"counts": counts}


def sanitizer_verdict(done: processes.Outcome) -> str:
    """Say "clean", "N errors", "refused: why", "overran", or "no summary"."""
    if done.overran:
        return f"overran: killed after {done.seconds:.0f} s"
    refusal = next((line for line in done.lines if REFUSALS.match(line)), None)
    summaries = [int(count) for line in done.lines for count in SUMMARY.findall(line)]
    if summaries and max(summaries) == 0 and done.returncode == 0:
        return "clean"
    if refusal is not None:
        return f"refused: {refusal.strip()}"
    if not summaries:
        return f"no summary, exit code {done.returncode}"
    return f"{max(summaries)} errors, exit code {done.returncode}"


def sanitizer(place: Workplace, seconds: float) -> Details:
    tool, driver = find_tool("compute-sanitizer"), _driver()
    if tool is None:
        raise NotRunError("compute-sanitizer was not found")
    if driver is None:
        raise NotRunError(f"there is no {DRIVER}")
    verdicts, left = {}, seconds
    for position, name in enumerate(SANITIZERS):
        share = left / (len(SANITIZERS) - position)
        options = ("--tool", name, "--error-exitcode", "9")
        done = place.run(tool, *options, driver, "--quick", seconds=share)
        left -= done.seconds
        verdicts[name] = sanitizer_verdict(done)
    bad = {name for name, text in verdicts.items() if "exit code" in text}
    if bad:
        raise FailedError(f"{', '.join(sorted(bad))} found something", tools=verdicts)
    if "clean" not in verdicts.values():
        raise NotRunError(f"no tool ended: {verdicts['memcheck']}", tools=verdicts)
    return {"tools": verdicts}
