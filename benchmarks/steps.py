# SPDX-License-Identifier: Apache-2.0
"""Steps of a long unattended run: subprocesses with time limits of their own inside one deadline.

A step that fails or runs out of time is an outcome, never an exception: the rest still runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, NOT_RUN, SKIPPED = "ok", "failed", "timed out", "not run", "skipped"
SKIP = 77  # exit status of a command that cannot run on this machine; its last line gives the reason
INTERRUPTED = 130  # exit status of a command that was ended by Ctrl-C, as shells report it
COMMAND = "$ "  # begins the line of a log before what a command prints
LEAST = 3.0  # seconds that a step needs to be started
GRACE = 8.0  # seconds after the interrupt, for reports


class Deadline:
    """The end of the whole run."""

    def __init__(self, seconds: float, reserve: float = 5.0) -> None:
        self.end = time.monotonic() + seconds
        self.reserve = reserve  # seconds for the work after the last step

    def left(self) -> float:
        return self.end - self.reserve - time.monotonic()


@dataclass(frozen=True)
class Step:
    """A command, its limit in seconds, and where its output is appended. `{budget}` in an argument becomes
    the seconds that it is given. After the exit status `again` it runs once more, as often as `attempts`.
    `says`: so many last lines of a command that succeeds are its results."""

    name: str
    command: Sequence[str]
    limit: float
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    again: int | None = None
    attempts: int = 3
    says: int = 0


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    seconds: float
    detail: str = ""
    notes: tuple[str, ...] = ()  # the first information about a failure

    def __str__(self) -> str:
        return f"{self.name:20} {self.status:10} {self.seconds:6.1f} s  {self.detail}".rstrip()


def tail(path: Path, lines: int = 10, width: int = 200) -> tuple[str, ...]:
    """The last lines of a log."""
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return tuple(line[:width] for line in text[-lines:])


def _end_all(process: subprocess.Popen[Any]) -> None:
    """Kills a process that leads a session, and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def shown(
    arguments: Sequence[str], environment: Mapping[str, str], root: Path, limit: float | None = None
) -> tuple[int, list[str]]:
    """Exit status and lines of a command, printed as they come; it is killed after `limit` seconds."""
    process = subprocess.Popen(
        arguments, cwd=root, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    killer = threading.Timer(limit or threading.TIMEOUT_MAX, _end_all, [process])
    killer.daemon = True
    killer.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        return process.wait(), lines
    finally:  # an interrupt too
        killer.cancel()
        _end_all(process)


def _stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """Interrupt, so that a test run still reports; then end everything that the step started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _end_all(process)
    process.wait()


def _once(step: Step, seconds: float, root: Path, grace: float) -> int | None:
    """Exit status, None when time ran out."""
    budget = max(seconds - grace, 0.5 * seconds)
    command = [part.replace("{budget}", f"{budget:.0f}") for part in step.command]
    environment = {**os.environ, **step.environment}
    with step.log.open("ab") as log:
        log.write(f"\n{COMMAND}{' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(budget)
        except subprocess.TimeoutExpired:
            _stop(process, seconds - budget)
            return None
        except BaseException:  # the run itself is being ended
            _stop(process, 1.0)
            raise


def _said(step: Step) -> tuple[str, ...]:
    """The last lines of its last command that are results."""
    lines = tail(step.log, step.says) if step.says else ()
    begin = max((i + 1 for i, line in enumerate(lines) if line.startswith(COMMAND)), default=0)
    return tuple(line for line in lines[begin:] if line.strip())


def run(step: Step, deadline: Deadline, root: Path, grace: float = GRACE) -> Outcome:
    """Runs a step within its limit and what the deadline leaves, of which up to `grace` seconds are for it to
    stop."""
    begin = time.monotonic()

    def left() -> float:
        return min(step.limit - (time.monotonic() - begin), deadline.left())

    least = min(LEAST, step.limit / 2)
    if left() < least:
        return Outcome(step.name, NOT_RUN, 0.0, "no time was left")
    code: int | None = None
    for _ in range(1 if step.again is None else step.attempts):
        try:
            code = _once(step, left(), root, grace)
        except OSError as failure:
            return Outcome(step.name, FAILED, time.monotonic() - begin, str(failure))
        if code is None or code != step.again or left() < least:
            break
    spent = time.monotonic() - begin
    if code == 0:
        said = _said(step)
        return Outcome(step.name, OK, spent, *((said[0],) if len(said) == 1 else ("", said)))
    if code == SKIP:
        return Outcome(step.name, SKIPPED, spent, " ".join(tail(step.log, 1)))
    status, detail = (TIMED_OUT, "stopped") if code is None else (FAILED, f"exit status {code}")
    return Outcome(step.name, status, spent, detail, tail(step.log))
