"""Benchmarks on the CPU; benchmarks.gpu_check runs those on a GPU. Every result is checked against fp64, then
all providers of a case are timed in turns and their records appended. Exit status: 1 when a target is missed,
or this library fails or is wrong; 130 when interrupted: the records measured until then are kept."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Inductor's compile workers start in the background and would slow down the first cases.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # messages of the profiler would appear inside tables

import torch

from fused_ewclora.demo.environment import timestamp

from . import extras, harness, machine, memory, registry, table
from .case import OURS, Case, Provider
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

    def __init__(self) -> None:
        self._at, self._ceilings = -CEILINGS_AGE, Ceilings()

    def now(self) -> Ceilings:
        if time.monotonic() - self._at > CEILINGS_AGE:
            self._ceilings, self._at = ceilings("cpu", 0.1), time.monotonic()
        return self._ceilings


def _built(plan: Planned) -> Case | list[Record]:
    """The case; where its inputs cannot be allocated, failed records of ours and of all peers."""
    try:
        return SUITES[plan.suite].build(plan.workload, Place())
    except (RuntimeError, MemoryError) as failure:
        roles = {OURS: "ours", **dict.fromkeys(registry.peers(plan.workload), "peer")}
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
    plan: Planned, peers: Sequence[str] | None, seconds: float, rates: Rates, min_rounds: int
) -> tuple[list[Record], list[Record]]:
    """Records and targets of one case."""
    with memory.limited():
        case = _built(plan)
        if isinstance(case, list):
            return case, []
        case = chosen(case, peers)
        seconds *= SUITES[plan.suite].share
        records = harness.measure(case, seconds, rates.now(), memory.CpuClock(min_rounds))
        SUITES[plan.suite].after(case, records)
    return records, harness.verdicts(case, records)


def _failed(records: Sequence[Record], rows: Sequence[Record]) -> bool:
    """Whether ours failed or missed a target; failures of peers do not count."""
    ours = [r for r in records if r["role"] != "peer" and "failed" in r]
    return any(not r["failed"].startswith(extras.Unavailable.__name__) for r in ours) or any(
        verdict_of(row) == SHORT for row in rows
    )


def run(cases: Sequence[Planned], args: argparse.Namespace) -> int:
    """Measures the cases; prints and appends the records after each."""
    stamp = {"environment": {**environment(), **extras.versions()}}
    rates, kept, failed, begin = Rates(), 0, False, time.monotonic()
    try:
        for number, plan in enumerate(cases, 1):
            torch.manual_seed(0)
            records, rows = take(plan, args.provider, args.seconds, rates, args.min_rounds)
            title = f"[{number}/{len(cases)}] {plan.workload}"
            print("\n".join(table.lines(title, records, rows)), flush=True)
            failed |= _failed(records, rows)
            if args.out is not None:
                targets = [row for row in rows if verdict_of(row) != MISSING]
                harness.append(
                    args.out / f"{plan.suite}.jsonl",
                    records,
                    {**stamp, "time": timestamp(), "targets": targets},
                )
                kept += len(records)
    except KeyboardInterrupt:
        where = f"{kept} records kept in {args.out}" if kept else "no records were written"
        print(f"\ninterrupted in case {number} of {len(cases)}: {where}", flush=True)
        return INTERRUPTED
    where = f"{kept} records appended to {args.out}" if kept else "no records written"
    print(f"\n{len(cases)} cases in {(time.monotonic() - begin) / 60:.1f} minutes, {where}")
    return int(failed)


def _choice(what: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A type for argparse that ignores case and lists what is valid."""
    by_name = {name.lower(): name for name in valid}

    def convert(text: str) -> str:
        if text.lower() not in by_name:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; expected one of: {'; '.join(valid)}")
        return by_name[text.lower()]

    return convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    presets = "; ".join(f"{name}: {what}" for name, (what, _) in registry.PRESETS.items())
    add = parser.add_argument
    add("--preset", type=_choice("preset", list(registry.PRESETS)), default="cpu", help=presets)
    add("--suite", nargs="+", type=_choice("suite", list(SUITES)), default=list(SUITES),
        metavar="NAME", help=f"of {', '.join(SUITES)}")  # fmt: skip
    add("--op", nargs="+", type=_choice("op", registry.OPS), default=list(registry.OPS),
        metavar="NAME", help=f"of {', '.join(registry.OPS)}")  # fmt: skip
    add("--shape", nargs="+", metavar="LABEL", help='labels of the preset\'s cases, such as "ViT-B proj"')
    add("--provider", nargs="+", type=_choice("provider", PEERS), metavar="NAME",
        help=f"peers to run beside ours and the floors, of: {'; '.join(PEERS)}")  # fmt: skip
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of all providers")
    add("--seconds", type=float, help="time per provider and case")
    add("--min-rounds", type=int, default=7, help="rounds per case, however long they take")
    add("--out", "--output", type=Path, help=f"folder the records are appended to; default: {RESULTS}, "
        "except with the preset quick, whose few rounds are not worth keeping")  # fmt: skip
    add("--dry", action="store_true", help="measure and print without writing records")
    add("--list", action="store_true", help="print the cases and stop")
    return parser


def _selected(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Planned]:
    """The cases that the options select; an error of the parser where there are none."""
    cases = planned(args.preset, args.suite, args.op)
    if not cases:
        parser.error(f"no case of {', '.join(args.op)} in {', '.join(args.suite)}; see --list")
    labels = list(dict.fromkeys(plan.label for plan in cases))
    try:
        wanted = labels if args.shape is None else [_choice("shape", labels)(text) for text in args.shape]
    except argparse.ArgumentTypeError as failure:
        parser.error(f"argument --shape: {failure}")
    yield from (plan for plan in cases if plan.label in wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    cases = list(_selected(parser, args))
    if args.list:
        print("\n".join(f"{plan.suite}: {plan.workload}" for plan in cases))
        return 0
    if args.threads < 1 or args.min_rounds < 2:
        parser.error("expected at least 1 of --threads and 2 of --min-rounds, for quantiles")
    if args.dry:
        args.out = None
    elif args.out is None and args.preset != "quick":
        args.out = RESULTS
    args.seconds = registry.PRESETS[args.preset][1] if args.seconds is None else args.seconds
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return run(cases, args)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    raise SystemExit(main())
