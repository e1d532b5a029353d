"""Runs one suite on a GPU: `python -m benchmarks.gpu SUITE --out DIR`.

Appends records to DIR/SUITE.jsonl case by case and skips cases that are there already, so that a suite that
was cut short goes on where it stopped. Exit status 1 when one of our own providers failed or was wrong, 75
when the device was lost and a new process can go on.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import records
from ..case import ROLES
from ..clock import WallClock, clock_of
from ..harness import DeviceLost, Record, append, measure
from ..machine import Ceilings, ceilings, environment
from ..shapes import REHEARSAL, RELEASE
from . import ewc_penalty, fisher_accumulate, lora_linear, merge, training_step
from .plan import Place, Planned

SUITES = {
    "lora_linear": lora_linear.plan,
    "ewc_penalty": ewc_penalty.plan,
    "fisher_accumulate": fisher_accumulate.plan,
    "training_step": training_step.plan,
    "merge": merge.plan,
}
KINDS = ("pass", "mode", "precision", "optimizer", "matrices")
DEVICE_LOST = 75  # "temporary failure": try again
PEERS = frozenset(ROLES) - {"ours", "variant", "floor"}  # a peer that fails is its own affair


def planned(suite: str, rehearsal: bool = False) -> list[Planned]:
    """All cases of a suite, in order of importance; of a rehearsal, one of each kind."""
    cases = list(SUITES[suite](REHEARSAL if rehearsal else RELEASE))
    if not rehearsal:
        return cases
    kinds: dict[tuple[object, ...], Planned] = {}
    for case in cases:
        kinds.setdefault((case.op, case.dtype, case.marker, *(case.shape.get(name) for name in KINDS)), case)
    return list(kinds.values())


def broken(found: Iterable[Record]) -> list[Record]:
    """Records of failures that are ours."""
    return [r for r in found if "failed" in r and r.get("role") not in PEERS]


def show(found: Sequence[Record]) -> None:
    """A case in a few lines."""
    first = found[0]
    print(f"\n{first['op']}  {', '.join(f'{k} {v}' for k, v in first['shape'].items())}  {first['dtype']}")
    for r in found:
        if "failed" in r:
            print(f"  {r['provider']:40} {r['failed']}")
            continue
        error = "-" if r["error_fp64"] is None else f"{r['error_fp64']:.1e}"
        host = "-" if r["host_seconds"] is None else f"{r['host_seconds'] * 1e6:.0f}"
        print(
            f"  {r['provider']:40} {r['seconds']['p50'] * 1e6:10.1f} us {r['timing']:8} host {host:>8} us  "
            f"{r['gbytes_per_second']:8.1f} GB/s {r['gflops_per_second'] / 1e3:7.1f} TFLOP/s  error {error}",
            flush=True,
        )


def _measured(one: Planned, place: Place, seconds: float, found: Ceilings, clock: WallClock) -> list[Record]:
    try:
        with clock.running():
            case = one.case(place)
    except Exception as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:400]
        head = {"op": one.op, "shape": one.shape, "dtype": one.dtype, "provider": one.marker, "role": "ours"}
        return [{**head, "failed": f"the case could not be built: {reason}"}]
    return measure(case, seconds, found, clock)


def run(suite: str, out: Path, place: Place, seconds: float, budget: float) -> int:
    """Measures what is left of a suite within `budget` seconds; the exit status."""
    begin = time.monotonic()
    torch.manual_seed(0)
    clock = WallClock(min_rounds=2, warm=False) if place.rehearsal else clock_of(place.device)
    path = out / f"{suite}.jsonl"
    done = records.read(path)
    left = [one for one in planned(suite, place.rehearsal) if not one.done(done)]
    limits = ceilings(place.device, 0.01 if place.rehearsal else 0.2)
    machine = environment(place.device)
    print(f"{suite}: {len(left)} cases; ceilings {', '.join(f'{k} {v:.3g}' for k, v in limits.items())}")
    status = 0
    for number, one in enumerate(left):
        if time.monotonic() - begin > budget:
            print(f"{len(left) - number} of {len(left)} cases were not reached in {budget:.0f} s")
            break
        lost = False
        try:
            found = _measured(one, place, seconds, limits, clock)
        except DeviceLost as failure:
            found, lost = failure.records, True
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        extra: dict[str, Any] = {"environment": machine, "time": now}
        append(path, found, extra)
        show(found)
        status |= bool(broken(found))
        if lost:
            return DEVICE_LOST
        del found
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()
    return status


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("suite", choices=sorted(SUITES))
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
