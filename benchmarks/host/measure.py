# SPDX-License-Identifier: Apache-2.0
"""Checks the callers of a case, times them in turns, and makes a record of each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..collection import HOST
from ..harness import Record, error_to_truth, reason, verdict
from .case import CHECKED, Caller, HostCase
from .clock import HostClock, Timed
from .place import HostPlace

PLANNED = 3  # calls after which a host of Triton is done again from C++


def _common(case: HostCase, caller: Caller) -> Record:
    return {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "provider": caller.name, "role": caller.role,
        "timing": HOST,
    }  # fmt: skip


def _error(case: HostCase, caller: Caller, truths: dict[Any, Any]) -> float | None:
    """The error against fp64 of results that are compared; raises when it is too large. `truths` holds what
    was computed before."""
    if caller.results != CHECKED:
        return None
    truth = caller.truth or case.truth
    if truth not in truths:
        truths[truth] = [t.detach() for t in truth()]
    assert caller.check is not None
    with caller.using():
        error = error_to_truth(caller.check(), truths[truth])
    if not error <= case.tolerance:
        raise ArithmeticError(f"wrong: error {error:.3g} against fp64, allowed {case.tolerance:.3g}")
    return error


def _observed(caller: Caller, timed: Timed, place: HostPlace) -> tuple[int | None, str]:
    """Launches, and the algorithm in words: that of the caller, or those that were chosen."""
    if caller.backend != "triton":
        return None, caller.algorithm
    with caller.using():
        for _ in range(PLANNED):
            timed.run()
        launches, chosen = place.observed(timed.run)
    return launches, caller.algorithm or chosen


def _prepared(
    case: HostCase, caller: Caller, clock: HostClock, place: HostPlace, truths: dict[Any, Any]
) -> tuple[Record, Timed]:
    """The record of a checked caller, without times, and its call, ready to be timed."""
    timed = Timed(caller.make(), caller.using)
    error = _error(case, caller, truths)
    launches, algorithm = _observed(caller, timed, place)
    clock.prepare(timed)
    record = {
        **_common(case, caller),
        "floor": caller.role == "floor",
        "backend": caller.backend,
        "algorithm": algorithm,
        "results": caller.results,
        "launches": launches,
        "error_fp64": error,
        "tolerance": case.tolerance,
    }
    return record, timed


def measure(case: HostCase, rounds: int, clock: HostClock, place: HostPlace) -> list[Record]:
    """One record per caller, with the reason where it failed, is wrong or cannot be had."""
    records: dict[str, Record] = {}
    timed: dict[str, Timed] = {}
    truths: dict[Any, Any] = {}

    def failed(caller: Caller, failure: Exception) -> None:
        records[caller.name] = {**_common(case, caller), "failed": reason(failure)}

    for caller in case.callers:
        try:
            records[caller.name], timed[caller.name] = _prepared(case, caller, clock, place, truths)
        except Exception as failure:
            failed(caller, failure)
    try:
        times = dict(zip(timed, clock.times(list(timed.values()), rounds), strict=True))
    except Exception as failure:
        for caller in case.callers:
            if caller.name in timed:
                failed(caller, failure)
        return list(records.values())
    for name, samples in times.items():
        quantiles = statistics.quantiles(samples, n=10, method="inclusive")
        seconds = {"p20": quantiles[1], "p50": quantiles[4], "p80": quantiles[7]}
        records[name] |= {"seconds": seconds, "rounds": len(samples)}
    return list(records.values())


def verdicts(case: HostCase, records: Sequence[Record]) -> list[Record]:
    """One row per target: the ratio of our median to the bound's peer, the limit, and whether it is met."""
    by_provider = {r["provider"]: r for r in records if "seconds" in r}
    return [verdict(target, [by_provider], case.ours) for target in case.targets]
