# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on the CPU; benchmarks.gpu_check runs those on a GPU. Every result is checked against fp64, then
all providers of a case are timed in turns and their records appended. Exit status: 1 when a target is missed,
or this library fails or is wrong; 130 when interrupted: the records measured until then are kept."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Inductor's compile workers start in the background and would slow down the first cases.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # messages of the profiler would appear inside tables

import torch

from fused_ewclora._arguments import PROG, Parser, device, one_of, unknown
from fused_ewclora.demo.environment import timestamp
from fused_ewclora.errors import ArgumentError

from . import exports, extras, harness, machine, memory, own, registry, table
from .case import OURS, Case, Provider
from .clock import clock_of
from .collection import MISSING, SHORT, SWEEP, verdict_of
from .harness import Record
from .machine import Ceilings, ceilings, environment
from .place import Place
from .steps import INTERRUPTED
from .suites import SUITES
from .workload import Workload

RESULTS = machine.RESULTS / "cpu"
CEILINGS_AGE = 15.0  # seconds after which ceilings are measured again

PEERS = sorted({*(name for names in registry.PEERS.values() for name in names), *registry.BATCH_MODE_PEERS})


class Planned(NamedTuple):
    """A case that has not run yet."""

    suite: str
    workload: Workload

    @property
    def label(self) -> str:
        """The name by which --shape selects the case."""
        return str(self.workload.shape.get("model", self.workload.shape.get(SWEEP)))


def planned(preset: str, suites: Sequence[str], ops: Sequence[str] = registry.OPS) -> list[Planned]:
    """The cases of these suites and operations, in the order of SUITES."""
    return [
        Planned(name, workload)
        for name in SUITES
        if name in suites
        for workload in SUITES[name].plan(preset)
        if workload.op in ops
    ]


class Rates:
    """The ceilings of the machine, measured again from time to time, because its load may change."""

    def __init__(self, where: str = "cpu") -> None:
        self._at, self._ceilings, self._where = -CEILINGS_AGE, Ceilings(), where

    def now(self) -> Ceilings:
        if time.monotonic() - self._at > CEILINGS_AGE:
            self._ceilings, self._at = ceilings(self._where, 0.1), time.monotonic()
        return self._ceilings


def _built(plan: Planned, place: Place) -> Case | list[Record]:
    """The case; where its inputs cannot be allocated, failed records of ours and of all peers."""
    try:
        return SUITES[plan.suite].build(plan.workload, place)
    except (RuntimeError, MemoryError) as failure:
        roles = {OURS: "ours", **dict.fromkeys([*registry.peers(plan.workload), *place.own], "peer")}
        return [
            {
                **harness.common(plan.workload, name, role),
                "failed": f"{type(failure).__name__}: {failure}"[:400],
            }
            for name, role in roles.items()
        ]


def chosen(case: Case, peers: Sequence[str] | None) -> Case:
    """The case with only these peers, and without targets about others; None selects all peers."""
    if peers is None:
        return case
    kept: list[Provider] = [p for p in case.providers if p.role in ("ours", "floor") or p.name in peers]
    names = {p.name for p in kept}
    asked = [t for t in case.targets if t.peer is None or t.peer in names]
    return dataclasses.replace(case, providers=kept, targets=asked)


def take(
    plan: Planned,
    peers: Sequence[str] | None,
    seconds: float,
    rates: Rates,
    min_rounds: int,
    place: Place | None = None,
) -> tuple[list[Record], list[Record]]:
    """Records and targets of one case."""
    place = place or Place()
    with contextlib.nullcontext() if place.gpu else memory.limited():
        case = _built(plan, place)
        if isinstance(case, list):
            return case, []
        case = chosen(case, peers)
        if own.is_own(plan.workload):  # targets are about the shapes of presets
            case = dataclasses.replace(case, targets=())
        seconds *= SUITES[plan.suite].share
        clock = clock_of(place.device) if place.gpu else memory.CpuClock(min_rounds)
        clock.min_rounds = min_rounds
        records = harness.measure(case, seconds, rates.now(), clock)
        if not place.gpu:
            SUITES[plan.suite].after(case, records)
    return records, harness.verdicts(case, records)


def _failed(records: Sequence[Record], rows: Sequence[Record]) -> bool:
    """Whether ours failed or missed a target; failures of peers do not count."""
    ours = [r for r in records if r["role"] != "peer" and "failed" in r]
    return any(not r["failed"].startswith(extras.Unavailable.__name__) for r in ours) or any(
        verdict_of(row) == SHORT for row in rows
    )


def run(cases: Sequence[Planned], args: argparse.Namespace) -> int:
    """Measures the cases; prints and appends the records after each, and exports all of them at the end."""
    stamp = {"environment": {**environment(args.device), **extras.versions()}}
    say = functools.partial(print, file=sys.stderr if exports.STDOUT in (args.json, args.csv) else None)
    peers, functions = own.providers(args.provider)
    place = Place(args.device, own=functions)
    rates, kept, failed, begin = Rates(args.device), 0, False, time.monotonic()
    measured: list[Record] = []
    try:
        for number, plan in enumerate(cases, 1):
            torch.manual_seed(0)
            records, rows = take(plan, peers, args.seconds, rates, args.min_rounds, place)
            title = f"[{number}/{len(cases)}] {plan.workload}"
            say("\n".join(table.lines(title, records, rows)), flush=True)
            failed |= _failed(records, rows) or any(
                "failed" in record and record["provider"] in functions for record in records
            )
            targets = [row for row in rows if verdict_of(row) != MISSING]
            more = {**stamp, "time": timestamp(), "targets": targets}
            measured += [{**record, **more} for record in records]
            if args.out is not None:
                harness.append(args.out / f"{plan.suite}.jsonl", records, more)
                kept += len(records)
    except KeyboardInterrupt:
        exports.write(measured, args.json, args.csv)
        where = f"{kept} records kept in {args.out}" if kept else "no records were written"
        say(f"\ninterrupted in case {number} of {len(cases)}: {where}", flush=True)
        return INTERRUPTED
    exports.write(measured, args.json, args.csv)
    where = f"{kept} records appended to {args.out}" if kept else "no records written"
    say(f"\n{len(cases)} cases in {(time.monotonic() - begin) / 60:.1f} minutes, {where}")
    return int(failed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    presets = "; ".join(f"{name}: {what}" for name, (what, _) in registry.PRESETS.items())
    add = parser.add_argument
    add("--preset", type=one_of("preset", registry.PRESETS), default="cpu", help=presets)
    add("--suite", nargs="+", type=one_of("suite", SUITES), default=list(SUITES),
        metavar="NAME", help=f"of {', '.join(SUITES)}")  # fmt: skip
    add("--op", nargs="+", type=one_of("op", registry.OPS), default=list(registry.OPS),
        metavar="NAME", help=f"of {', '.join(registry.OPS)}")  # fmt: skip
    add("--shape", nargs="+", metavar="SHAPE", help='labels of the preset\'s cases, such as "ViT-B proj"; or '
        f"numbers of your own for one --op: {own.forms()}")  # fmt: skip
    add("--dtype", choices=tuple(own.DTYPES), default=None, help="of shapes of your own (default: fp32)")
    add("--provider", "--providers", nargs="+", type=own.provider(PEERS), metavar="NAME",
        help=f"peers to run beside ours and the floors, of: {'; '.join(PEERS)}; or a function of your own, "
        "package.module:function, with the signature of the op in fused_ewclora.functional")  # fmt: skip
    add("--device", type=device, default="cpu", help="cpu, or cuda for shapes of your own (default: cpu)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of all providers")
    add("--seconds", type=float, help="time per provider and case")
    add("--min-rounds", "--rounds", type=int, default=7, help="rounds per case, however long they take")
    add("--out", "--output", type=Path, help=f"folder the records are appended to; default: {RESULTS}, "
        "except for the preset quick and shapes of your own")  # fmt: skip
    add("--json", type=exports.file, metavar="FILE", help="one JSON object of all records; - for stdout")
    add("--csv", type=exports.file, metavar="FILE", help="a line per provider and case; - for stdout")
    add("--dry", action="store_true", help="measure and print without appending records")
    add("--list", action="store_true", help="print the cases and stop")


def _parser() -> Parser:
    parser = Parser(prog=f"{PROG} bench run", description=__doc__)
    add_arguments(parser)
    return parser


def _selected(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Planned]:
    """The cases that the options select; an error of the parser where there are none."""
    cases = planned(args.preset, args.suite, args.op)
    if not cases:
        parser.error(f"no case of {', '.join(args.op)} in {', '.join(args.suite)}; see --list")
    labels = {plan.label.lower(): plan.label for plan in cases}
    wanted = labels if args.shape is None else [text.lower() for text in args.shape]
    for text in wanted:
        if text not in labels:
            numbers = f", or for one --op numbers: {own.forms(args.op)}"
            parser.error(f"argument --shape: {unknown('shape', text, labels.values())}{numbers}")
    yield from (plan for plan in cases if plan.label.lower() in wanted)


def _of_own_shapes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Planned]:
    """A case for each of the user's shapes."""
    if len(args.op) != 1:
        parser.error(f"argument --shape: numbers are for one --op: {own.forms()}")
    try:
        workloads = [own.workload(args.op[0], text, args.dtype or "fp32") for text in args.shape]
    except ArgumentError as failure:
        parser.error(str(failure))
    suite = next(name for name in SUITES if args.op[0] in SUITES[name].ops)
    return [Planned(suite, workload) for workload in workloads]


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, of_own: bool) -> None:
    """Ends with an error of the parser for options that do not go together."""
    if args.threads < 1 or args.min_rounds < 2:
        parser.error("expected at least 1 of --threads and 2 of --min-rounds, for quantiles")
    if args.seconds is not None and not 0.0 <= args.seconds < float("inf"):
        parser.error(f"argument --seconds: expected a finite number >= 0, got {args.seconds}")
    if args.json == args.csv == exports.STDOUT:
        parser.error("--json and --csv: only one of them can go to stdout")
    functions = own.providers(args.provider)[1]
    if functions and (len(args.op) != 1 or args.op[0] not in own.FIELDS):
        ops = ", ".join(own.FIELDS)
        parser.error(f"argument --provider: {next(iter(functions))} needs one --op, of {ops}")
    if not of_own and (args.dtype is not None or args.device != "cpu"):
        parser.error("--dtype and --device are for shapes of your own, as --op merge --shape 12,768,768,10")


def execute(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Measures what the options say; returns the exit status."""
    of_own = args.shape is not None and any(own.has_numbers(text) for text in args.shape)
    _check(parser, args, of_own)
    cases = _of_own_shapes(parser, args) if of_own else list(_selected(parser, args))
    if args.list:
        print("\n".join(f"{plan.suite}: {plan.workload}" for plan in cases))
        return 0
    if args.dry:
        args.out = None
    elif args.out is None and args.preset != "quick" and not of_own:
        args.out = RESULTS
    args.seconds = registry.PRESETS[args.preset][1] if args.seconds is None else args.seconds
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return run(cases, args)
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit status."""
    parser = _parser()
    return execute(parser, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
