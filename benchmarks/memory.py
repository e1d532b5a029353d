"""Memory of computations on the CPU: what a call allocates at its peak, and a limit that allocations meet
before the machine does.

The peak of a call is the largest running sum, over its allocations and frees in order of time, of the bytes
that PyTorch's CPU allocator handed out during the call: results and temporaries, without what was there
before. The allocator reports to torch.profiler. What a library takes by itself is not seen: packing buffers
of BLAS, vectors of C++ code (the kernels of this library take their scratch from the allocator).
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .clock import MIN_ROUNDS, WallClock

SPARE = 0.9  # of what is free may be taken


def peak_bytes(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """The result of a call and its peak; None where this version of PyTorch does not list allocations."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    recorded = getattr(profile.profiler, "kineto_results", None)
    if recorded is None:
        return result, None
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        peak = max(peak, held)
    return result, peak


class CpuClock(WallClock):
    """The wall clock; peaks are those of a second call, outside of all timed rounds, which also warms up."""

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
    """What can still be allocated, by the machine and by the control group; None where nobody says."""
    found = []
    info = Path("/proc/meminfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
        found += [1024 * int(line.split()[1]) for line in lines]
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        found.append(limit - used)
    return min(found) if found else None


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, an allocation beyond the free memory fails, which is a reason in a record; without a limit the
    system would end the process, and with it the run."""
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
