# SPDX-License-Identifier: Apache-2.0
"""Memory of computations on the CPU: a clock that also measures peaks, and a limit that makes an allocation
fail before the machine runs out of memory."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fused_ewclora.demo.memory import peak_bytes

from .clock import MIN_ROUNDS, WallClock

SPARE = 0.9  # share of the free memory that may be allocated


class CpuClock(WallClock):
    """The wall clock; the peak is that of a second call, outside the timed rounds, which also warms up."""

    def __init__(self, min_rounds: int = MIN_ROUNDS) -> None:
        super().__init__(min_rounds, warm=False)

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        run()  # what is compiled or cached at the first call is not part of a call
        return peak_bytes(run)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def free_bytes() -> int | None:
    """Memory that can still be allocated, within the machine and the control group; None where unknown."""
    limits = []
    info = Path("/proc/meminfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
        limits += [1024 * int(line.split()[1]) for line in lines]
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        limits.append(limit - used)
    return min(limits) if limits else None


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A context in which an allocation beyond the free memory fails, and a record states the reason; without
    it the system would kill the process, and so end the run."""
    free = free_bytes()
    status = Path("/proc/self/status")
    if free is None or not status.exists():
        yield
        return
    data = [line for line in status.read_text().splitlines() if line.startswith("VmData:")]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = 1024 * int(data[0].split()[1]) + int(SPARE * free)
    if before[1] != resource.RLIM_INFINITY:
        wanted = min(wanted, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
