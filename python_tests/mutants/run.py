# SPDX-License-Identifier: Apache-2.0
"""Plant each fault, and show that the check which is named with it notices.

    python python_tests/mutants/run.py BUILD...         faults in what these builds are of
    python python_tests/mutants/run.py BUILD... norm    faults whose description contains this

A build is that of .ci/package.sh with the emulator, for faults in CUDA kernels, or that of
setup.py, for all others. Nothing of it or of the checkout is changed: at most one object is
compiled from a copy of csrc, by the command of the build, and linked with the others into a program
or a library of its own; a fault in Python stands in a copy of the package. The exit code is 1 if a
fault is missed, does not apply or does not compile, or if a check fails without a fault.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python_tests"))

from mutants import faults, faults_on_cpu  # noqa: E402
from mutants.faults import CSRC, Fault  # noqa: E402

FAULTS = [*faults.FAULTS, *faults_on_cpu.FAULTS]
DRIVER, LIBRARY, HOST = "uhd_cuda_driver", "libuhd_cpu.so", "libuhd_host.so"
# The ninja of this Python's environment is often not on PATH.
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
SECONDS = 300  # for one program: a fault that hangs is not caught, but ends
# Tests run in processes that are forked where these are imported: to import them takes longest.
PRELOADED = ["torch", "torch.distributed.tensor", "torch._dynamo", "pytest", "hypothesis", "timm"]


def run(command: Sequence, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )


def command_for(target: str, build: Path) -> list[str]:
    """Return the command by which the build makes a target, without the shell's part of it."""
    done = run([NINJA or "ninja", "-t", "commands", target], build)
    if done.returncode:
        raise RuntimeError(done.stdout)
    words = shlex.split(done.stdout.splitlines()[-1])
    return words[2:-2] if words[:2] == [":", "&&"] else words


def target_of(fault: Fault) -> str:
    """Return what is linked from the object of a fault."""
    if fault.objects == "uhd_host":
        return HOST
    return LIBRARY if is_test(fault.check) else DRIVER


def built_with(fault: Fault, build: Path, sound: Path, folder: Path) -> Path:
    """Plant a fault; return the program with it, or the folder that holds the package.

    Args:
        fault: The fault.
        build: The build that compiles it.
        sound: The folder that holds the package without it.
        folder: Where to work.

    Raises:
        RuntimeError: It does not compile.
    """
    if fault.is_python:
        package = shutil.copytree(sound, folder / "package")
        (package / fault.file).write_text(fault.planted())
        return package
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    (copy / fault.file).write_text(fault.planted())
    unit = f"CMakeFiles/{fault.objects}.dir/csrc/{fault.source}.o"
    target = target_of(fault)
    (folder / unit).parent.mkdir(parents=True)
    # Paths of outputs are relative, so they lie in the folder; a fault may leave a variable unused.
    compiled = [word.replace(str(CSRC), str(copy)) for word in command_for(unit, build)]
    # Inputs of the linker lie in the build, but for the one.
    linked = [
        str(folder / word) if word in (unit, target) else word
        for word in command_for(target, build)
    ]
    # -O3 takes three times as long, for checks of a second; emulated kernels run for longer.
    compiled += ["-w"] if fault.is_emulated else ["-w", "-O1"]
    for command, place in ((compiled, folder), (linked, build)):
        done = run(command, place)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
    if target == DRIVER:
        return folder / DRIVER
    package = shutil.copytree(sound, folder / "package")
    shutil.move(folder / target, package / "uhd_ops" / target)
    return package


def package_of(build: Path, folder: Path) -> Path:
    """Lay the package out as the checkout and a build have it now; return its folder."""
    package = folder / "sound"
    shutil.copytree(
        ROOT / "uhd_ops", package / "uhd_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for library in (LIBRARY, HOST):
        shutil.copy(build / library, package / "uhd_ops")
    return package


def is_test(check: str) -> bool:
    return check.startswith("python_tests/")


def settings_of(fault: Fault) -> dict[str, str]:
    """Return the environment that the check of a fault runs in."""
    if fault.is_emulated:
        return {"UHD_EMULATOR_ORDER": "greedy"}
    return {"UHD_OPS_CPU_ISA": fault.isa} if fault.objects.startswith("kernels_") else {}


def run_tests(
    checks: Iterable[str], package: Path, settings: dict[str, str]
) -> subprocess.CompletedProcess:
    """Run tests on a package in a process of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile() as log:
        arguments = (list(checks), str(package), settings, str(ROOT), log.name)
        process = context.Process(target=_tests, args=arguments)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(shlex.join(checks), SECONDS)
        text = Path(log.name).read_text(errors="replace")
        return subprocess.CompletedProcess(list(checks), process.exitcode, text)


def _tests(checks: list[str], package: str, settings: dict[str, str], root: str, log: str) -> None:
    import pytest

    os.environ.update(settings)
    os.chdir(root)
    sys.path.insert(0, package)
    with open(log, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    # Only the plugins that the tests need: starting takes as long as most of the tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    off = ("no:cacheprovider", "no:unraisableexception", "no:threadexception")
    plugins = [("-p", name) for name in (*off, "pytest_timeout", "_hypothesis_pytestplugin")]
    options = ["-q", "-x", "-m", "not cuda", "--tb=line", "--assert=plain", *sum(plugins, ())]
    sys.exit(int(pytest.main([*options, *checks])))


def noticed(checks: Sequence[str], program: Path, settings: dict[str, str]) -> str:
    """Run tests, or one case of the driver; return what they found wrong, or nothing.

    Raises:
        RuntimeError: They could not be run, so they say nothing.
    """
    if is_test(checks[0]):
        done = run_tests(checks, program, settings)
        complaint = re.search(r"^E? *(\S*Error: .*|.*FAILED .*)$", done.stdout, re.MULTILINE)
    else:
        done = run([program, *checks], ROOT)
        complaint = re.search(r"^(FAILED|STOPPED at) .*$", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}: {done.stdout[-200:].strip()}"
    if done.returncode == 1 and complaint:
        return complaint[0].strip()
    names = " ".join(checks)
    raise RuntimeError(f'"{names}" ended with {done.returncode}:\n{done.stdout[-2000:]}')


def is_caught(fault: Fault, build: Path, sound: Path, scratch: Path) -> bool:
    """Plant one fault, and print what noticed it or why nothing did."""
    begin, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=scratch))
    try:
        program = built_with(fault, build, sound, folder)
        found = noticed([fault.check], program, settings_of(fault))
        text = found or f'"{fault.check}" passes'
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        found, text = "", str(error)
    finally:
        shutil.rmtree(folder)
    seconds = time.monotonic() - begin
    verdict = "caught" if found else "MISSED"
    print(f"{verdict} {fault.what} ({seconds:.0f} s)\n       {text[:4000]}", flush=True)
    return bool(found)


def checks_without_faults(
    planted: Sequence[Fault], build: Path, sound: Path
) -> list[tuple[list[str], Path, dict[str, str]]]:
    """Return arguments of :func:`noticed`: the tests for each environment together."""
    together: dict[tuple, list[str]] = {}
    for fault in planted:
        driver = "" if is_test(fault.check) else fault.check
        checks = together.setdefault((driver, *settings_of(fault).items()), [])
        if fault.check not in checks:
            checks.append(fault.check)
    return [
        (checks, build / DRIVER if driver else sound, {} if driver else dict(settings))
        for (driver, *settings), checks in together.items()
    ]


def main(*words: str) -> int:
    builds = [Path(word).resolve() for word in words if Path(word, "build.ninja").exists()]
    part = " ".join(words[len(builds) :])
    # To fork is safe as long as torch has started no threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = int(os.environ.get("UHD_TEST_PROCESSES", "2"))
    wrong, caught = [], []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        scratch = Path(scratch)
        for build in builds:
            is_emulated = "kernels_emulated.dir" in (build / "build.ninja").read_text()
            planted = [f for f in FAULTS if part in f.what and f.is_emulated == is_emulated]
            if not planted:
                continue
            sound = build / "package" if is_emulated else package_of(build, scratch)
            # The same checks without a fault: what fails there notices nothing.
            checks = checks_without_faults(planted, build, sound)
            wrong += [text for text in pool.map(noticed, *zip(*checks, strict=True)) if text]
            caught += pool.map(lambda f: is_caught(f, build, sound, scratch), planted)  # noqa: B023
    for text in wrong:
        print(f"WRONG  without a fault: {text}")
    print(f"{sum(caught)} of {len(caught)} faults were caught")
    return int(bool(wrong) or not caught or not all(caught))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
