# SPDX-License-Identifier: Apache-2.0
"""Runs one suite on a GPU: `python -m benchmarks.gpu SUITE --out DIR`.

Appends records to DIR/SUITE.jsonl case by case and skips cases that are there already, so that an interrupted
suite continues where it stopped. Exit status 1 when one of our own providers failed or was wrong, 75 when the
device was lost and a new process can continue.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_ewclora.demo.environment import timestamp

from .. import energy, predict, records, registry
from ..case import OURS, ROLES
from ..clock import WallClock, clock_of
from ..extras import Unavailable, versions
from ..harness import DeviceLost, Record, append, common, measure
from ..machine import Ceilings, ceilings, environment
from ..place import Place
from ..suites import SUITES
from ..workload import LATER, Workload

NAMES = tuple(name for name, suite in SUITES.items() if suite.plan("gpu"))
ENERGY = 0.08  # share of the budget for measuring energy, spent on the first cases
DEVICE_LOST = 75  # "temporary failure": try again
PEERS = frozenset(ROLES) - {"ours", "variant", "floor"}  # roles whose failures do not count


def planned(suite: str, rehearsal: bool = False) -> list[Workload]:
    """All cases of a suite, in order of importance; of a rehearsal, one of each kind."""
    return SUITES[suite].plan("rehearsal" if rehearsal else "gpu")


def marker(workload: Workload) -> str:
    """The provider whose record shows that a case, or a later part of one, was done."""
    return registry.peers(workload)[0] if workload.part == LATER else OURS


def done(workload: Workload, previous: Iterable[Record]) -> bool:
    """Whether records hold the outcome of this part."""
    return any(
        r["provider"] == marker(workload) and records.key(r) == records.key(vars(workload)) for r in previous
    )


def broken(results: Iterable[Record]) -> list[Record]:
    """Records of failures of ours, except those because a library is not installed."""
    failed = [r for r in results if "failed" in r and r.get("role") not in PEERS]
    return [r for r in failed if not r["failed"].startswith(Unavailable.__name__)]


def show(results: Sequence[Record]) -> None:
    """Prints the records of a case."""
    first = results[0]
    print(f"\n{first['op']}  {', '.join(f'{k} {v}' for k, v in first['shape'].items())}  {first['dtype']}")
    for r in results:
        if "failed" in r:
            print(f"  {r['provider']:40} {r['failed']}")
            continue
        error = "-" if r["error_fp64"] is None else f"{r['error_fp64']:.1e}"
        joules = f"{r['millijoules_per_call']:8.3g} mJ  " if "millijoules_per_call" in r else ""
        host = "-" if r["host_seconds"] is None else f"{r['host_seconds'] * 1e6:.0f}"
        print(
            f"  {r['provider']:40} {r['seconds']['p50'] * 1e6:10.1f} us {r['timing']:8} host {host:>8} us  "
            f"{r['gbytes_per_second']:8.1f} GB/s {r['gflops_per_second'] / 1e3:7.1f} TFLOP/s  "
            f"{joules}error {error}",
            flush=True,
        )


def _measured(
    suite: str, workload: Workload, place: Place, seconds: float, limits: Ceilings, clock: WallClock
) -> list[Record]:
    try:
        with clock.running():
            case = predict.filled(SUITES[suite].build(workload, place))
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:400]
        return [
            {**common(workload, marker(workload), "ours"), "failed": f"the case could not be built: {reason}"}
        ]
    return measure(case, seconds, limits, clock)


def run(suite: str, out: Path, place: Place, seconds: float, budget: float) -> int:
    """Measures the remaining cases of a suite within `budget` seconds; returns the exit status."""
    begin = time.monotonic()
    torch.manual_seed(0)
    meter, energy_source = (None, "not measured") if place.rehearsal else energy.meter(ENERGY * budget)
    clock = WallClock(2, warm=False) if place.rehearsal else clock_of(place.device, meter)
    path = out / f"{suite}.jsonl"
    before = records.read(path)
    left = [workload for workload in planned(suite, place.rehearsal) if not done(workload, before)]
    limits = ceilings(place.device, 0.01 if place.rehearsal else 0.2)
    machine = {**environment(place.device), **versions(), "energy": energy_source}
    print(f"{suite}: {len(left)} cases; ceilings {', '.join(f'{k} {v:.3g}' for k, v in limits.items())}")
    status = 0
    for number, workload in enumerate(left):
        if time.monotonic() - begin > budget:
            print(f"{len(left) - number} of {len(left)} cases were not reached in {budget:.0f} s")
            break
        lost = False
        try:
            results = _measured(suite, workload, place, seconds, limits, clock)
        except DeviceLost as failure:
            results, lost = failure.records, True
        extra: dict[str, Any] = {"environment": machine, "time": timestamp()}
        append(path, results, extra)
        show(results)
        status |= bool(broken(results))
        if lost:
            return DEVICE_LOST
        del results
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()
    return status


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("suite", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per provider and case")
    parser.add_argument("--budget", type=float, default=600.0, help="no case starts after so many seconds")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, interpreted")
    args = parser.parse_args()
    place = Place("cpu" if args.rehearse else "cuda", args.rehearse)
    status = run(args.suite, args.out, place, args.seconds, args.budget)
    if status == DEVICE_LOST:  # an orderly exit would use the device once more, and abort
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
