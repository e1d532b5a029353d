# SPDX-License-Identifier: Apache-2.0
"""Timing of computations: the wall clock on a CPU, events around graph replays on a GPU.

A clock is used inside its `running()`. `prepare` warms up a computation and its rotation; `times` samples
several prepared computations in turns, so that all of them are measured under the same load of the machine.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_ewclora.demo.memory import peak_bytes

from .energy import Meter, Unmeasurable

MIN_ROUNDS, MAX_ROUNDS = 7, 60


@dataclass
class Prepared:
    """A computation ready to be timed: `once` runs it `share` times, on different buffers."""

    once: Callable[[], Any]
    share: int
    timing: str  # "wall", "graph" (replays of a captured graph) or "events" (around eager launches)
    host_seconds: float | None = None  # of one eager call, launches included, on an idle device
    repeats: int = 1
    keep: list[Any] = field(default_factory=list)


class WallClock:
    """For CPUs."""

    max_rounds = MAX_ROUNDS

    def __init__(self, min_rounds: int = MIN_ROUNDS, warm: bool = True) -> None:
        self.min_rounds, self.warm = min_rounds, warm

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    def prepare(self, runs: Sequence[Callable[[], Any]]) -> Prepared:
        for run in [*runs, runs[0]] if self.warm else ():
            run()
        return Prepared(_in_turn(runs), len(runs), "wall")

    def times(self, prepared: Sequence[Prepared], seconds: float) -> list[list[float]]:
        """Samples of each, for about `seconds` each."""
        samples: list[list[float]] = [[] for _ in prepared]
        begin = time.perf_counter()
        while prepared and self._more(len(samples[0]), time.perf_counter() - begin, seconds * len(prepared)):
            for computation, times in zip(prepared, samples, strict=True):
                start = time.perf_counter()
                computation.once()
                times.append((time.perf_counter() - start) / computation.share)
        return samples

    def _more(self, rounds: int, spent: float, budget: float) -> bool:
        return rounds < self.min_rounds or (spent < budget and rounds < self.max_rounds)

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result of `run`, and its peak memory in bytes where that can be measured."""
        return run(), None

    def energy(self, prepared: Prepared) -> float | None:
        """Millijoules of one computation, where there is a counter."""
        return None

    def check(self) -> None:
        """Raises when the device can no longer be used."""


class CudaClock(WallClock):
    """For GPUs: everything runs on one side stream, on which graphs can be captured."""

    max_rounds = 200
    sample_seconds = (
        5e-4  # replays are repeated for at least this long, so that the gap before them is negligible
    )
    spin_cycles = 200_000  # about 0.1 ms of device work, during which the launches are queued

    burst = 4  # samples between two readings of the energy counter

    def __init__(self, meter: Meter | None = None) -> None:
        super().__init__()
        self.stream, self.meter = torch.cuda.Stream(), meter

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        # Graphs of one run share memory: they run one after the other, and their results are not read.
        self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.synchronize()

    def prepare(self, runs: Sequence[Callable[[], Any]]) -> Prepared:
        for run in [*runs, runs[0]]:
            run()
        host = self._host_seconds(runs)
        prepared = self._captured(runs) or Prepared(_in_turn(runs), len(runs), "events")
        prepared.host_seconds = host
        prepared.once()
        single = self._elapsed([prepared])[0] * prepared.share
        if prepared.timing == "graph":
            prepared.repeats = max(1, math.ceil(self.sample_seconds / max(single, 1e-6)))
        return prepared

    def _host_seconds(self, runs: Sequence[Callable[[], Any]], budget: float = 0.02) -> float:
        torch.cuda.synchronize()
        begin, calls = time.perf_counter(), 0
        while calls < 2 or (time.perf_counter() - begin < budget and calls < 50):
            runs[calls % len(runs)]()
            calls += 1
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    def _captured(self, runs: Sequence[Callable[[], Any]]) -> Prepared | None:
        """A graph of all runs, one after the other; None where they cannot be captured."""
        torch.cuda.synchronize()
        if 2 * torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory:
            torch.cuda.empty_cache()  # a capture cannot free cached blocks
        # torch.cuda.graph() would collect garbage and empty the cache before each of hundreds of captures.
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # a tensor or graph collected during a capture can break it
        try:
            graph.capture_begin(pool=self.pool)
            try:
                for run in runs:
                    run()
            finally:
                graph.capture_end()
        except Exception as failure:
            torch.cuda.synchronize()  # raises if the device itself is lost
            self.pool = torch.cuda.graph_pool_handle()
            if "out of memory" in str(failure):
                raise
            return None
        finally:
            gc.enable()
        return Prepared(graph.replay, len(runs), "graph", keep=[graph])

    def _elapsed(self, prepared: Sequence[Prepared]) -> list[float]:
        """One sample of each, queued behind device work, seconds per computation."""
        events = []
        for computation in prepared:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Eager launches take host time, during which the device must not become idle.
            eager = computation.timing == "events" and computation.host_seconds
            cycles = self.spin_cycles + int(min(eager * computation.share, 0.02) * 2e9 if eager else 0)
            torch.cuda._sleep(cycles)
            start.record()
            for _ in range(computation.repeats):
                computation.once()
            end.record()
            events.append((start, end, computation.repeats * computation.share))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / count for start, end, count in events]

    def times(self, prepared: Sequence[Prepared], seconds: float) -> list[list[float]]:
        samples: list[list[float]] = [[] for _ in prepared]
        begin = time.perf_counter()
        while prepared and self._more(len(samples[0]), time.perf_counter() - begin, seconds * len(prepared)):
            for times, sample in zip(samples, self._elapsed(prepared), strict=True):
                times.append(sample)
        return samples

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int | None]:
        run()  # workspaces of libraries and compiled kernels are not part of a call
        return peak_bytes(run, "cuda")

    def energy(self, prepared: Prepared) -> float | None:
        if self.meter is None:
            return None
        rounds = (
            self.burst * prepared.repeats if prepared.repeats > 1 else 1
        )  # a single replay is long enough

        def burst() -> int:
            for _ in range(rounds):
                prepared.once()
            torch.cuda.synchronize()
            return rounds * prepared.share

        try:
            return self.meter.per_call(burst)
        except Unmeasurable:  # the times of the case are already measured, and matter more
            self.meter = None
            return None

    def check(self) -> None:
        torch.cuda.synchronize()


def _in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def once() -> None:
        for run in runs:
            run()

    return once


def clock_of(device: str, meter: Meter | None = None) -> WallClock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock(meter) if device == "cuda" else WallClock()
