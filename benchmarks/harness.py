# SPDX-License-Identifier: Apache-2.0
"""Checks every provider against fp64, times them interleaved, and appends one JSON record per provider."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .case import Case, Provider, Target
from .clock import Prepared, WallClock
from .machine import Ceilings
from .workload import Workload

FLOOR = "bytes at copy bandwidth"
Record = dict[str, Any]


class DeviceLost(RuntimeError):
    """The device fails every call after an earlier error; only a new process can continue."""

    def __init__(self, reason: str, records: list[Record]) -> None:
        super().__init__(reason)
        self.records = records


def error_to_truth(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest relative error of a result, each in its own norm; NaN when a result holds one."""
    if len(results) != len(truth):
        return math.inf
    errors = []
    for result, expected in zip(results, truth, strict=True):
        if result.shape != expected.shape:
            return math.inf
        difference = (result.detach().double() - expected.double()).norm()
        errors.append(difference / expected.double().norm().clamp_min(1e-300))
    return float(torch.stack(errors).max())


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """torch.get_float32_matmul_precision() is `precision` inside; None changes nothing."""
    before = torch.get_float32_matmul_precision()
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def least_seconds(case: Case, ceilings: Ceilings) -> float:
    """The time of a case at the ceiling: its bytes at the copy bandwidth or its FLOPs at the rate of a large
    product, whichever takes longer."""
    moved = case.bytes / ceilings["copy"] if "copy" in ceilings else 0.0
    return max(moved, case.flops / ceilings[case.product] if case.product in ceilings else 0.0)


def common(case: Case | Workload, provider: str, role: str) -> Record:
    """The fields of every record, including failed ones."""
    return {"op": case.op, "shape": case.shape, "dtype": case.dtype, "provider": provider, "role": role}


def _record(
    case: Case,
    provider: Provider,
    error: float | None,
    peak: int | None,
    prepared: Prepared,
    times: list[float],
    ceilings: Ceilings,
    energy: float | None = None,
) -> Record:
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    least = least_seconds(case, ceilings)
    return {
        **common(case, provider.name, provider.role),
        "backend": provider.backend,
        "algorithm": provider.algorithm,
        "floor": provider.role == "floor",
        "error_fp64": error,
        "tolerance": case.tolerance,
        "timing": prepared.timing,
        "seconds": {"p20": p20, "p50": p50, "p80": p80},
        "rounds": len(times),
        "host_seconds": prepared.host_seconds,
        "predicted_seconds": provider.predicted,
        "peak_bytes": peak,
        **({} if energy is None else {"millijoules_per_call": energy}),
        "flops": case.flops,
        "bytes": case.bytes,
        "gflops_per_second": case.flops / p50 / 1e9,
        "gbytes_per_second": case.bytes / p50 / 1e9,
        "fraction_of_ceiling": least / p50 if least else None,
        "ceilings": dict(ceilings),
    }


def _computed_floor(case: Case, ceilings: Ceilings) -> list[Record]:
    if case.floor_bytes is None or "copy" not in ceilings:
        return []
    seconds = case.floor_bytes / ceilings["copy"]
    floor = Provider(FLOOR, list, role="floor")
    prepared = Prepared(lambda: None, 1, "computed")
    return [_record(case, floor, None, None, prepared, [seconds] * 2, ceilings)]


def reason(failure: BaseException) -> str:
    """Why a provider has no measurement, in one line."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:400]


def _sound(
    case: Case, provider: Provider, truth: Sequence[Tensor], clock: WallClock
) -> tuple[Prepared, float | None, int | None]:
    """Runs and checks a provider and prepares its timing; raises if it fails or is wrong."""
    results, peak = clock.peak(provider.run)
    error = None
    if provider.role != "floor":
        error = error_to_truth(provider.check() if provider.check else results, truth)
        if not error <= case.tolerance:
            raise ArithmeticError(f"wrong: error {error:.3g} against fp64, allowed {case.tolerance:.3g}")
    del results
    return clock.prepare([provider.run, *provider.rotation]), error, peak


def measure(case: Case, seconds: float, ceilings: Ceilings, clock: WallClock | None = None) -> list[Record]:
    """Records of the providers of one case. A provider that fails or is wrong is recorded with the reason and
    not timed. Raises `DeviceLost`, with the records so far, when the device can no longer be used."""
    clock = clock or WallClock()
    records = _computed_floor(case, ceilings)
    sound: list[tuple[Provider, Prepared, float | None, int | None]] = []

    def failed(provider: Provider, failure: BaseException) -> None:
        records.append({**common(case, provider.name, provider.role), "failed": reason(failure)})

    def still_alive() -> None:
        try:
            clock.check()
        except RuntimeError as lost:
            for provider, *_ in sound:
                failed(provider, lost)
            raise DeviceLost(reason(lost), records) from lost

    with matmul_precision(case.precision), clock.running():
        try:
            truth = [t.detach() for t in case.truth()]
        except Exception as failure:
            for provider in case.providers:
                failed(provider, failure)
            still_alive()
            return records
        for provider in case.providers:
            try:
                outcome = _sound(case, provider, truth, clock)
                clock.check()
                sound.append((provider, *outcome))
            except Exception as failure:
                failed(provider, failure)
                still_alive()
        del truth
        try:
            times = clock.times([prepared for _, prepared, _, _ in sound], seconds)
            energies = [clock.energy(prepared) for _, prepared, _, _ in sound]
        except Exception as failure:
            for provider, *_ in sound:
                failed(provider, failure)
            sound = []
            still_alive()
            return records
    for (provider, prepared, error, peak), samples, energy in zip(sound, times, energies, strict=True):
        records.append(_record(case, provider, error, peak, prepared, samples, ceilings, energy))
    return records


def value_of(record: Record, metric: str) -> float:
    """A quantile of the times ("p50"), or another numeric field of the record; NaN if it has none."""
    value = record["seconds"][metric] if metric in record.get("seconds", {}) else record.get(metric)
    return math.nan if value is None else float(value)


def verdict(target: Target, cases: Sequence[Mapping[str, Record]], ours: str) -> Record:
    """One row: a metric of `ours`, summed over `cases` (records by provider), compared with the target's
    bound. Where the bound is only an allowance, the ratio is relative to the allowance and the limit is 1."""

    def total(name: str) -> float:
        return sum(value_of(records.get(name, {}), target.metric) for records in cases)

    bound = target.allowance
    if target.peer == "best peer":
        names = {name for records in cases for name, r in records.items() if r.get("role") == "peer"}
        totals = [value for value in map(total, sorted(names - {ours})) if not math.isnan(value)]
        bound += target.limit * min(totals) if totals else math.nan
    elif target.peer is not None:
        bound += target.limit * total(target.peer)
    value = total(ours) if cases else math.nan
    limit = target.limit or float(target.peer is None and target.allowance > 0.0)
    scale = bound / limit if limit else 1.0  # without allowance: the peer's value
    ratio = value / scale if scale else math.inf
    return {"target": target.name, "ratio": ratio, "limit": limit, "met": value <= bound}


def verdicts(case: Case, records: Sequence[Record]) -> list[Record]:
    """One row per target: ratio of our median to the peer's, the limit, and whether it is met."""
    by_provider = {r["provider"]: r for r in records if "seconds" in r}
    return [verdict(target, [by_provider], case.ours) for target in case.targets]


def append(path: Path, records: Sequence[Record], extra: Record) -> None:
    """Adds the records to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({**record, **extra}) + "\n")
