# SPDX-License-Identifier: Apache-2.0
"""Run a command in a process group of its own, show its lines at once, and end it on time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_S = 3.0  # between asking a process group to end and ending it


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (None if it was killed), its lines, its time."""

    returncode: int | None
    lines: list[str]
    seconds: float

    @property
    def overran(self) -> bool:
        return self.returncode is None

    def tail(self, count: int = 40) -> str:
        return "\n".join(self.lines[-count:])


def run(
    command: Sequence[str | Path],
    *,
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    quiet: bool = False,
) -> Outcome:
    """Run ``command`` for at most ``seconds``.

    Args:
        command: Program and arguments.
        seconds: After that time the process group is killed.
        log: File that every line is appended to.
        environment: Variables beside those of this process.
        directory: Where to run it.
        quiet: Whether to keep its lines out of this process's output.

    Returns:
        The outcome. No process of the group is left, however the call ends.

    Raises:
        OSError: The program cannot be started.
    """
    start, lines = time.monotonic(), []
    # errors="replace": a tool may print bytes that are no UTF-8, and that must not end a stage.
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
        start_new_session=True,
        cwd=directory,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    reader = threading.Thread(target=_read, args=(process, lines, log, quiet), daemon=True)
    reader.start()
    returncode: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            returncode = process.wait(timeout=max(0.0, seconds))
            reader.join(timeout=GRACE_S)
    finally:
        # A reader that still waits means that a child of the command holds its output open.
        if process.poll() is None or reader.is_alive():
            _end_group(process)
            reader.join(timeout=GRACE_S)
    return Outcome(returncode, lines, time.monotonic() - start)


def _read(process: subprocess.Popen, lines: list[str], log: Path, quiet: bool) -> None:
    with process.stdout, log.open("a") as file:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            file.write(line)
            file.flush()
            if not quiet:
                print(line, end="", flush=True)


def _end_group(process: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while _group_exists(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _group_exists(process: subprocess.Popen) -> bool:
    process.poll()  # reaps the leader, which would otherwise count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
