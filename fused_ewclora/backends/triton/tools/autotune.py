# SPDX-License-Identifier: Apache-2.0
"""Measuring configurations: FUSED_EWCLORA_AUTOTUNE=1, or `python -m fused_ewclora autotune`.

A configuration is tuned on the representative workloads that look it up, never on a caller's tensors: hosts
run with the entry overridden, results are checked against the reference in fp64, and the fastest is written
to the file of `measured`. The search starts from the shipped entry and moves to the best neighbour while that
is faster.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...candidate import Candidate
from .. import measured, tables
from ..tables import Entry, Key
from . import workloads

MAX_TRIALS = 48
WORTH = 0.98  # a neighbour must take less than this share of the time to be moved to
LARGEST = {"num_warps": 16, "num_stages": 6}
LARGEST_BLOCK = 512
SMALLEST_BLOCK = 16  # `tl.dot` takes no smaller ones
ROUNDING = 1e-6  # relative error that never counts
BROKEN = 0.2  # twice the relative error at which even the shipped configuration is refused

Config = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]


class Trial(NamedTuple):
    """One configuration: its time, or why it was discarded."""

    config: Config
    seconds: float = math.inf
    reason: str | None = None


@dataclass(frozen=True)
class Tuned:
    """The best configuration of a key, as an entry of a table, and everything that was tried."""

    entry: Entry
    trials: list[Trial]


def neighbours(config: Config) -> list[Config]:
    """Configurations one step away: a number halved or doubled, one stage more or fewer, TMA left out."""
    return [{**config, name: step} for name, value in config.items() for step in _steps(name, value)]


def _steps(name: str, value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [False] if value else []
    if not isinstance(value, int):
        return []
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    least = SMALLEST_BLOCK if name.startswith("BLOCK") else 1
    return [step for step in steps if least <= step <= LARGEST.get(name, LARGEST_BLOCK)]


def search(
    start: Config, attempt: Callable[[Config], Trial], limit: int = MAX_TRIALS, end: float = math.inf
) -> list[Trial]:
    """Every trial, the best first. `start` is tried first and must succeed; after `end`, on the clock of
    `time.monotonic`, no trial begins."""
    best = attempt(start)
    trials = [best]
    if best.reason is not None:
        return trials
    while True:
        before = best
        for config in neighbours(before.config):
            if len(trials) >= limit or time.monotonic() > end:
                break
            if any(config == trial.config for trial in trials):
                continue
            trial = attempt(config)
            trials.append(trial)
            if trial.reason is None and trial.seconds < WORTH * before.seconds:
                best = min(best, trial, key=lambda t: t.seconds)
        if best is before:
            return sorted(trials, key=lambda t: (t is not best, t.seconds))


@dataclass
class Run:
    """One algorithm on one workload, with its arguments and its result in fp64."""

    workload: workloads.Workload
    candidate: Candidate
    arguments: tuple[Any, ...]
    exact: list[Tensor]

    def __call__(self) -> Any:
        return self.candidate.run(*self.arguments)

    def errors(self) -> list[float]:
        """Relative error of every result; what the op mutates is a copy here."""
        with self.workload.precision_set():
            results = _results(self.workload.op, self.candidate, self.arguments)
        return [_error(got, exact) for got, exact in zip(results, self.exact, strict=True)]


def _results(op: str, candidate: Candidate, arguments: tuple[Any, ...]) -> list[Tensor]:
    if op.endswith("_"):
        first = arguments[0]
        written = [t.clone() for t in first] if isinstance(first, list) else first.clone()
        candidate.run(written, *arguments[1:])
        return list(_tensors(written))
    return list(_tensors(candidate.run(*arguments)))


def _tensors(value: Any) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    return [t for item in value for t in _tensors(item)]


def _error(got: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp_min(torch.finfo(torch.float64).tiny))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(item) for item in value] if isinstance(value, list | tuple) else value


def runs(key: Key, device: torch.device, sizes: workloads.Sizes = workloads.VIT_L) -> list[Run]:
    """For each op the first workload that looks `key` up, with every algorithm of it that does.

    Workloads of the current matmul precision come first.
    """
    found: dict[str, list[Run]] = {}
    current = torch.get_float32_matmul_precision()
    asked = workloads.workloads(ranks=(key.rank or workloads.RANKS[0],), sizes=sizes)
    for workload in sorted(asked, key=lambda w: w.dtype == torch.float32 and w.precision != current):
        if workload.op in found:
            continue
        asking = [c for c, _, keys in workloads.noted(workload, key.arch) if key in keys]
        if asking:
            found[workload.op] = prepared(workload, asking, device)
    return [run for of_op in found.values() for run in of_op]


def prepared(workload: workloads.Workload, asking: Sequence[Candidate], device: torch.device) -> list[Run]:
    """Algorithms of one workload, on the same arguments."""
    arguments = workload.make(workloads.Make(device))
    truth = reference.candidates(workload.op)[0]
    exact = _results(workload.op, truth, tuple(_double(list(arguments))))
    return [Run(workload, candidate, arguments, exact) for candidate in asking]


def time_on_gpu(run: Callable[[], Any]) -> float:
    """Median seconds of `run`, by CUDA events, with the second-level cache cleared before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median")) * 1e-3


def _timed(run: Run, timer: Timer) -> float:
    with run.workload.precision_set():
        return timer(run)


def tune(
    key: Key,
    asked: Sequence[Run],
    timer: Timer = time_on_gpu,
    limit: int = MAX_TRIALS,
    end: float = math.inf,
) -> Tuned:
    """The fastest configuration for `key` over the runs `asked`, among those as exact as the shipped one.

    Errors may be twice those of the shipped configuration. `RuntimeError` when that itself fails. `end` as in
    `search`.
    """
    start = dict(tables.shipped(key)["config"])

    def attempt(config: Config) -> Trial:
        with tables.override(_entry(key, config, "trial")):
            try:
                for run, bounds in zip(asked, allowed, strict=True):
                    if (reason := _wrong(run.errors(), bounds)) is not None:
                        return Trial(config, reason=f"{reason} in {run.workload.name}")
                return Trial(config, sum(_timed(run, timer) for run in asked))
            except Exception as error:  # compilers and launches raise anything
                return Trial(config, reason=f"{type(error).__name__}: {str(error).strip()[:300]}")

    with torch.no_grad():
        with tables.override(_entry(key, start, "shipped")):
            allowed = [[2.0 * error + ROUNDING for error in run.errors()] for run in asked]
        broken = [e for bounds in allowed for e in bounds if not e <= BROKEN]
        trials = (
            [Trial(start, reason=f"relative error {max(broken):.1e}")]
            if broken
            else search(start, attempt, limit, end)
        )
    best = trials[0]
    if best.reason is not None:
        raise RuntimeError(f"the shipped configuration of {key.kernel} fails: {best.reason}")
    shipped = next(trial for trial in trials if trial.config == start)
    source = f"measured: {best.seconds * 1e6:.1f} us, shipped {shipped.seconds * 1e6:.1f} us"
    return Tuned(_entry(key, best.config, source), trials)


def _wrong(errors: Sequence[float], bounds: Sequence[float]) -> str | None:
    for error, bound in zip(errors, bounds, strict=True):
        if not error <= bound:  # NaN is wrong as well
            return f"relative error {error:.1e} > {bound:.1e}"
    return None


def _entry(key: Key, config: Config, source: str) -> Entry:
    return {"kernel": key.kernel, "dtypes": [key.dtype], "rank": key.rank, "config": config, "source": source}


_tuning = threading.Lock()


def preferred(key: Key) -> Entry | None:
    """The measured entry for `key`, measured now if there is none; None where that is impossible.

    Inside the capture of a CUDA graph, and after an error (with a warning), the shipped entry serves.
    """
    with _tuning:
        entry = tables.recorded(key)
        if entry is not None or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return entry
        try:
            return measure(key).entry
        except Exception as error:  # out of memory, a read-only folder, a broken compiler
            warnings.warn(f"{key.kernel}, rank {key.rank}: not tuned: {error}", RuntimeWarning, stacklevel=2)
            return None


def measure(key: Key) -> Tuned:
    """Tune `key` on the current GPU and write the result to its file."""
    device = torch.device("cuda", torch.cuda.current_device())
    asked = runs(key, device)
    if not asked:
        raise RuntimeError("no representative workload looks it up")
    tuned = tune(key, asked, time_on_gpu)
    named = {**tuned.entry, "source": f"{tuned.entry['source']} ({torch.cuda.get_device_name(device)})"}
    measured.add(measured.path(key.arch), named)
    return Tuned(named, tuned.trials)


def keys(
    arch: str, dtypes: Sequence[torch.dtype] = workloads.DTYPES, ranks: Sequence[int] = workloads.RANKS
) -> list[Key]:
    """Everything that the representative workloads look up on `arch`, each once."""
    found: dict[Key, None] = {}
    for workload in workloads.workloads(dtypes, ranks):
        for _, _, asked in workloads.noted(workload, arch):
            found |= dict.fromkeys(asked)
    return list(found)
