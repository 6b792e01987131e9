# SPDX-License-Identifier: Apache-2.0
"""Plant each fault in the CUDA kernels, and show that the check which is named with it notices.

    python python_tests/mutants/run.py build/emulate        after .ci/package.sh has built it
    python python_tests/mutants/run.py build/emulate norm   faults whose description contains this

Nothing of the build or of the checkout is changed: one object is compiled from a copy of csrc, by
the command of the build, and linked with the others into a program or a library of its own. The
exit code is 1 if a fault is missed, does not apply or does not compile, or if a check fails without
a fault.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python_tests"))

from mutants.faults import CSRC, FAULTS, Fault  # noqa: E402

DRIVER, LIBRARY = "uhd_cuda_driver", "libuhd_cpu.so"
# The ninja of this Python's environment is often not on PATH.
NINJA = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
SECONDS = 300  # for one program: a fault that hangs is not caught, but ends


def run(command: Sequence, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
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


def built_with(fault: Fault, build: Path, folder: Path) -> Path:
    """Compile the fault, and link it; return the program, or the folder of the package.

    Raises:
        RuntimeError: It does not compile.
    """
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    (copy / fault.file).write_text(fault.planted())
    unit = f"CMakeFiles/kernels_emulated.dir/csrc/{fault.source}.o"
    target = LIBRARY if is_test(fault.check) else DRIVER
    (folder / unit).parent.mkdir(parents=True)
    # Paths of outputs are relative, so they lie in the folder; a fault may leave a variable unused.
    compiled = [word.replace(str(CSRC), str(copy)) for word in command_for(unit, build)]
    # Inputs of the linker lie in the build, but for the one.
    linked = [
        str(folder / word) if word in (unit, target) else word
        for word in command_for(target, build)
    ]
    for command, place in (([*compiled, "-w"], folder), (linked, build)):
        done = run(command, place)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
    if target == DRIVER:
        return folder / DRIVER
    shutil.copytree(build / "package", folder / "package")
    return Path(shutil.move(folder / LIBRARY, folder / "package" / "uhd_ops" / LIBRARY)).parent


def is_test(check: str) -> bool:
    return check.startswith("python_tests/")


def noticed(check: str, program: Path) -> str:
    """Run a check; return what it found wrong, or nothing.

    Raises:
        RuntimeError: It could not be run, so it says nothing.
    """
    if is_test(check):
        options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda", "--tb=line"]
        command = [sys.executable, "-P", "-m", "pytest", *options, check]
        done = run(command, ROOT, PYTHONPATH=str(program.parent), UHD_EMULATOR_ORDER="greedy")
        complaint = re.search(r"^E? *(\S*Error: .*|.*FAILED .*)$", done.stdout, re.MULTILINE)
    else:
        done = run([program, check], ROOT)
        complaint = re.search(r"^(FAILED|STOPPED at) .*$", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}: {done.stdout[-200:].strip()}"
    if done.returncode == 1 and complaint:
        return complaint[0].strip()
    raise RuntimeError(f'"{check}" ended with {done.returncode}:\n{done.stdout[-2000:]}')


def is_caught(fault: Fault, build: Path, scratch: Path) -> bool:
    """Plant one fault, and print what noticed it or why nothing did."""
    begin, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=scratch))
    try:
        found = noticed(fault.check, built_with(fault, build, folder))
        text = found or f'"{fault.check}" passes'
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        found, text = "", str(error)
    finally:
        shutil.rmtree(folder)
    seconds = time.monotonic() - begin
    verdict = "caught" if found else "MISSED"
    print(f"{verdict} {fault.what} ({seconds:.0f} s)\n       {text[:4000]}", flush=True)
    return bool(found)


def main(build: Path, part: str = "") -> int:
    faults = [fault for fault in FAULTS if part in fault.what]
    jobs = int(os.environ.get("UHD_TEST_PROCESSES", "2"))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        # The same checks without a fault: what fails there notices nothing.
        checks = list(dict.fromkeys(fault.check for fault in faults))
        sound = [
            build / "package" / "uhd_ops" if is_test(check) else build / DRIVER for check in checks
        ]
        wrong = [text for text in pool.map(noticed, checks, sound) if text]
        for text in wrong:
            print(f"WRONG  without a fault: {text}")
        caught = list(pool.map(lambda fault: is_caught(fault, build, Path(scratch)), faults))
    print(f"{sum(caught)} of {len(faults)} faults were caught, {len(checks)} checks")
    return int(bool(wrong) or not faults or not all(caught))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
