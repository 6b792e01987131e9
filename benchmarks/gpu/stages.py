# SPDX-License-Identifier: Apache-2.0
"""Stages in order, each with a deadline; what each found is on disk before the next one starts.

Nothing here knows about GPUs, and nothing imports torch.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, OVERRAN, NOT_RUN = "passed", "failed", "overran", "not run"
Details = dict[str, object]


class StageError(Exception):
    """A stage ended early: why, and what it found until then."""

    status = FAILED

    def __init__(self, reason: str, **details: object) -> None:
        super().__init__(reason)
        self.reason, self.details = reason, details


class FailedError(StageError):
    """Something that the stage checks is wrong."""


class OverranError(StageError):
    """The stage did not end by its deadline and was killed."""

    status = OVERRAN


class NotRunError(StageError):
    """The stage cannot run here; that is no failure."""

    status = NOT_RUN


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Its key in the record.
        run: Called with the seconds it may take; returns what goes into the record, or raises a
            StageError.
        share: Part of the budget at which it must be over. A stage that is over earlier leaves its
            time to the following ones.
        least: Seconds that it gets if the budget still has them, even beyond its share; with less
            left than that, it does not start.
        needs: Earlier stages without whose success it cannot run.
        unless: Given the record of the earlier stages, says why this one cannot run, or None.
    """

    name: str
    run: Callable[[float], Details]
    share: float
    least: float
    needs: tuple[str, ...] = ()
    unless: Callable[[Mapping[str, Details]], str | None] = lambda stages: None


class Record:
    """The results of one call, as JSON in a file that is never half-written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Details = {}

    @property
    def stages(self) -> dict[str, Details]:
        """What is known of each stage that is over, by name."""
        return self.data.setdefault("stages", {})

    def write(self) -> None:
        """Replace the file in one step: a reader finds the old content or the new one."""
        write_atomically(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def seconds_for(stage: Stage, budget: float, elapsed: float) -> float:
    """How long a stage may take that starts ``elapsed`` seconds into the budget."""
    return min(max(stage.share * budget - elapsed, stage.least), budget - elapsed)


def run_stages(
    stages: Sequence[Stage],
    budget: float,
    record: Record,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the stages in order, and write the record after each.

    A stage that fails, overruns or crashes stops only those that need it. What it raises ends up
    in the record; nothing but an interrupt leaves this function.
    """
    start = clock()
    for stage in stages:
        begin = clock()
        seconds = seconds_for(stage, budget, begin - start)
        details = _attempt(stage, seconds, record.stages)
        details["seconds"] = round(clock() - begin, 2)
        record.stages[stage.name] = details
        record.write()
        reason = f": {details['reason']}" if details.get("reason") else ""
        print(
            f"== {stage.name}: {details['status']} in {details['seconds']:.1f} s{reason}",
            flush=True,
        )


def _attempt(stage: Stage, seconds: float, earlier: Mapping[str, Details]) -> Details:
    try:
        _check_can_start(stage, seconds, earlier)
        print(f"== {stage.name}: at most {seconds:.0f} s", flush=True)
        return {"status": PASSED, **stage.run(seconds)}
    except StageError as error:
        return {"status": error.status, "reason": error.reason, **error.details}
    except Exception as error:  # noqa: BLE001 - the later stages still have something to say
        traceback.print_exc()
        return {"status": FAILED, "reason": f"crashed with {type(error).__name__}: {error}"}


def _check_can_start(stage: Stage, seconds: float, earlier: Mapping[str, Details]) -> None:
    reason = stage.unless(earlier)
    if reason:
        raise NotRunError(reason)
    for name in stage.needs:
        status = earlier[name]["status"]
        if status != PASSED:
            raise NotRunError(f"needs {name}, which is {status}: {earlier[name]['reason']}")
    if seconds < stage.least:
        left = max(0.0, seconds)
        raise NotRunError(
            f"{left:.0f} s of the budget are left, it needs at least {stage.least:.0f} s"
        )


def exit_code(stages: Mapping[str, Details]) -> int:
    """0 unless a stage failed or overran; a stage that was not run is no failure."""
    return int(any(details["status"] in (FAILED, OVERRAN) for details in stages.values()))
