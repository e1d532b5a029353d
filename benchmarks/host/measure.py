"""Checks the callers of a case, times them in turns, and makes a record of each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..harness import Record, error_to_truth, reason, verdict
from .case import CHECKED, Caller, HostCase
from .clock import HostClock, Timed
from .place import HostPlace

TIMING = "host"


def _common(case: HostCase, caller: Caller) -> Record:
    return {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "provider": caller.name, "role": caller.role,
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


def _launches(caller: Caller, timed: Timed, place: HostPlace) -> int | None:
    if caller.backend != "triton":
        return None
    with caller.using():
        return place.launches(timed.run)


def measure(case: HostCase, rounds: int, clock: HostClock, place: HostPlace) -> list[Record]:
    """One record per caller, with the reason where it failed, is wrong or cannot be had."""
    records: list[Record] = []
    sound: list[tuple[Record, Timed]] = []
    truths: dict[Any, Any] = {}
    for caller in case.callers:
        record = _common(case, caller)
        try:
            timed = Timed(caller.make(), caller.using)
            record["error_fp64"] = _error(case, caller, truths)
            clock.prepare(timed)
            record["launches"] = _launches(caller, timed, place)
        except Exception as failure:
            records.append({**_common(case, caller), "failed": reason(failure)})
            continue
        record |= {"backend": caller.backend, "algorithm": caller.algorithm, "results": caller.results}
        sound.append((record, timed))
    for (record, _), times in zip(sound, clock.times([timed for _, timed in sound], rounds), strict=True):
        p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
        seconds = {"p20": p20, "p50": p50, "p80": p80}
        records.append({
            **record, "floor": record["role"] == "floor", "tolerance": case.tolerance, "timing": TIMING,
            "seconds": seconds, "rounds": len(times),
        })  # fmt: skip
    order = {caller.name: number for number, caller in enumerate(case.callers)}
    return sorted(records, key=lambda record: order[record["provider"]])


def verdicts(case: HostCase, records: Sequence[Record]) -> list[Record]:
    """One row per target: the ratio of our median to the bound's peer, the limit, and whether it is met."""
    by_provider = {r["provider"]: r for r in records if "seconds" in r}
    return [verdict(target, [by_provider], case.ours) for target in case.targets]
