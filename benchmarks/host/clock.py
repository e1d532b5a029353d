# SPDX-License-Identifier: Apache-2.0
"""Host time of calls: CPU time of the calling thread, or on a GPU the time until a call returns."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 2e-3  # calls are repeated for about this long, so that the 0.3 us of the clock do not count
WARM_UP = 5  # calls, of which the first ones load, choose and compile
CPU_TIME, UNTIL_RETURN = "CPU time of the calling thread", "wall time until the call returns"


@dataclass
class Timed:
    """A call and the context around its repetitions, which is not timed."""

    run: Callable[[], Any]
    using: Callable[[], AbstractContextManager[object]]
    repeats: int = 1


class HostClock:
    """Times calls in turns.

    On a CPU, time that other processes take does not count. On a GPU the backward pass runs in a thread of
    autograd, so that the wall clock is used, and the device is idle before every sample; samples are short,
    so that the queue of launches does not fill.
    """

    def __init__(self, device: str = "cpu", sample_seconds: float = SAMPLE_SECONDS) -> None:
        self.gpu, self.sample_seconds = device == "cuda", sample_seconds

    @property
    def kind(self) -> str:
        return UNTIL_RETURN if self.gpu else CPU_TIME

    def _now(self) -> int:
        return time.perf_counter_ns() if self.gpu else time.thread_time_ns()

    def _settle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def sample(self, timed: Timed) -> float:
        """Seconds per call, of one sample. Where it has several calls, one more comes before: the caches of
        the processor hold the code of the caller before."""
        run, repeats = timed.run, range(timed.repeats)
        with timed.using():
            if timed.repeats > 1:
                run()
            self._settle()
            begin = self._now()
            for _ in repeats:
                run()
            end = self._now()
            self._settle()
        return max(end - begin, 1) * 1e-9 / timed.repeats

    def prepare(self, timed: Timed) -> None:
        """Warms a call up, and decides how often a sample repeats it."""
        single = min(self.sample(timed) for _ in range(WARM_UP))
        timed.repeats = max(1, math.ceil(self.sample_seconds / single))
        self.sample(timed)

    def times(self, everyone: Sequence[Timed], rounds: int) -> list[list[float]]:
        """Samples of each; every round begins with another one."""
        samples: list[list[float]] = [[] for _ in everyone]
        with _without_collections():
            for number in range(rounds):
                for i in range(len(everyone)):
                    which = (number + i) % len(everyone)
                    samples[which].append(self.sample(everyone[which]))
        return samples


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Garbage is collected before, not inside: a collection costs more than a call, and whose it is depends
    on chance."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def small_products(device: str) -> Iterator[None]:
    """One thread; on a CPU, products whose cost is that of their arithmetic.

    oneDNN spends 40 us on preparing each product in bf16, of whatever size, which a GPU does not: BLAS or
    plain loops compute them instead. Subnormal numbers, which memory that nothing has written may be full of,
    are taken as zero: arithmetic with them takes a hundred times longer. On a GPU, convolutions of fp32 are
    not rounded to tf32, so that results can be compared with fp64.
    """
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    try:
        if device != "cpu":
            torch.backends.cudnn.allow_tf32 = False
            yield
            return
        before = torch.backends.mkldnn.set_flags(_enabled=False)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            torch.backends.mkldnn.set_flags(_enabled=before[0])
    finally:
        torch.set_num_threads(threads)
        if device != "cpu":
            torch.backends.cudnn.allow_tf32 = tf32
