# SPDX-License-Identifier: Apache-2.0
"""What calls cost on the host: `fused-ewclora bench host`.

Layers, penalties, Fisher capture, merging and training steps, so small that a GPU would wait for the host.
Without a GPU the CPU stands in for one whose launches do nothing. What is computed is checked against fp64;
then all callers of a case are timed in turns, and their records appended. Exit status: 1 when a target is
missed, or this library fails or is wrong; 130 when interrupted: the records measured until then are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fused_ewclora as fe
from fused_ewclora._arguments import PROG, Parser
from fused_ewclora.demo.environment import timestamp

from .. import extras, harness, machine
from ..collection import MISSING, SHORT, verdict_of
from ..harness import Record
from ..plot import slug
from ..steps import INTERRUPTED
from . import captures, layers, merges, penalties, steps, table
from .case import HostCase
from .clock import HostClock, small_products
from .measure import measure, verdicts
from .place import HostPlace, place

SUITE = "host"
PARTS: dict[str, Callable[[HostPlace], Iterator[Callable[[], HostCase]]]] = {
    "layers": layers.cases, "penalties": penalties.cases, "captures": captures.cases,
    "merges": merges.cases, "steps": steps.cases,
}  # fmt: skip
ROUNDS = 31
RESULTS = machine.RESULTS


def described(where: HostPlace, clock: HostClock) -> dict[str, Any]:
    """The machine of the records. On a GPU it is that GPU, as for other records of it."""
    found = {**machine.environment(where.device), **extras.versions(), "clock": clock.kind}
    if not where.gpu:
        found["device"] = f"host of {found['device']}"
    if where.arch is not None:
        found["stands_in_for"] = where.arch
    if fe.available_backends()["triton"] is None:
        found["launcher"] = where.launcher
    return found


def folder_of(where: HostPlace) -> Path:
    """Where records are kept: those of a GPU beside its others."""
    return RESULTS / (slug(torch.cuda.get_device_name()) if where.gpu else SUITE)


def _failed(records: Sequence[Record], rows: Sequence[Record]) -> bool:
    """Whether ours failed or is wrong, or a target is missed; what cannot be had here does not count."""
    told = [r["failed"] for r in records if r["role"] in ("ours", "variant") and "failed" in r]
    missing = (extras.Unavailable.__name__, "BackendError")
    return any(not text.startswith(missing) for text in told) or any(verdict_of(row) == SHORT for row in rows)


def run(args: argparse.Namespace, where: HostPlace) -> int:
    """Measures the cases of the chosen parts; prints and appends the records after each."""
    clock = HostClock(where.device, args.seconds)
    stamp = {"environment": described(where, clock)}
    makes = [make for part in args.part for make in PARTS[part](where)]
    kept, failed, begin = 0, False, time.monotonic()
    try:
        for number, make in enumerate(makes, 1):
            torch.manual_seed(0)
            case = make()
            records = measure(case, args.rounds, clock, where)
            rows = verdicts(case, records)
            print("\n".join(table.lines(f"[{number}/{len(makes)}] {case}", case, records, rows)), flush=True)
            failed |= _failed(records, rows)
            if args.out is not None:
                targets = [row for row in rows if verdict_of(row) != MISSING]
                more = {**stamp, "time": timestamp(), "targets": targets}
                harness.append(args.out / f"{SUITE}.jsonl", records, more)
                kept += len(records)
    except KeyboardInterrupt:
        print(f"\ninterrupted in case {number} of {len(makes)}: {kept} records kept", flush=True)
        return INTERRUPTED
    to = f"{kept} records appended to {args.out / f'{SUITE}.jsonl'}" if kept else "no records written"
    print(f"\n{len(makes)} cases in {(time.monotonic() - begin) / 60:.1f} minutes, {to}")
    return int(failed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured; default: all")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds per case (default: {ROUNDS})")
    add("--seconds", type=float, default=2e-3, help="how long a call is repeated in every round")
    add("--out", type=Path, help=f"folder the records are appended to, in {SUITE}.jsonl; default: one of "
        f"{RESULTS}, {SUITE} or that of the GPU")  # fmt: skip
    add("--dry", action="store_true", help="measure and print without writing records")


def execute(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Measures what the options say; returns the exit status."""
    if args.rounds < 2 or not args.seconds > 0.0:
        parser.error("expected at least 2 of --rounds, for quantiles, and --seconds > 0")
    with place() as where, small_products(where.device):
        args.out = None if args.dry else args.out or folder_of(where)
        return run(args, where)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog=f"{PROG} bench host", description=__doc__)
    add_arguments(parser)
    return execute(parser, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
