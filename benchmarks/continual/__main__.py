# SPDX-License-Identifier: Apache-2.0
"""Continual learning with every method on real data: `fused-ewclora demo --suite`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_ewclora._arguments import PROG, Parser
from fused_ewclora.demo.job import Progress, device_of
from fused_ewclora.errors import ArgumentError, EWCLoRAError

from .. import records
from ..plot import MISSING
from ..steps import INTERRUPTED
from . import configuration, costs, pictures, suite, summary
from .configuration import Run
from .loggers import LOGGERS

SUITES = ("language", "vision")
COSTS = "costs"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "--suite",
        nargs="*",
        metavar="NAME",
        help=f"configurations by name or file ({' '.join(SUITES)}); '{COSTS}' measures steps over ten tasks",
    )
    command.add_argument("--list", action="store_true", help="show the configurations and their methods")
    command.add_argument("--quick", action="store_true", help="the configurations' short versions: minutes")
    command.add_argument(
        "--develop", action="store_true", help="every value of each method's grid, on the development seeds"
    )
    command.add_argument(
        "--methods", nargs="+", metavar="NAME", help="of the configurations, or of the costs; default: all"
    )
    command.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="instead of the configurations' own"
    )
    command.add_argument(
        "--out", type=Path, default=Path("suite-output"), help="records and pictures (suite-output)"
    )
    command.add_argument(
        "--data-root", type=Path, default=Path("data"), help="data; fetched where possible (data)"
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    command.add_argument("--jobs", type=int, help="runs at a time (cpu: one per core and thread; cuda: 1)")
    command.add_argument(
        "--threads", type=int, default=1, help="CPU threads of each run; 1 repeats exactly (1)"
    )
    command.add_argument(
        "--log",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f'every step and task: {", ".join(LOGGERS)} or "package.module:Class"; in <out>/logs',
    )
    command.add_argument("--json", action="store_true", help="print records to stdout instead of tables")


def chosen(args: argparse.Namespace) -> list[Run]:
    """The runs that the options select."""
    runs: list[Run] = []
    known: list[str] = []
    for name in args.suite or SUITES:
        if name == COSTS:
            known += costs.NAMES
            continue
        loaded = configuration.load(configuration.find(name), args.quick, args.develop)
        known += loaded.methods
        if args.seeds:
            loaded = configuration.with_seeds(loaded, args.seeds)
        runs += [run for run in loaded.runs if not args.methods or _is_of(run, args.methods, args.develop)]
    if args.methods and (unknown := [name for name in args.methods if name not in known]):
        raise ArgumentError(f"--methods: expected some of {sorted(set(known))}, got {unknown[0]!r}")
    return runs


def _is_of(run: Run, methods: Sequence[str], develop: bool) -> bool:
    """Whether it is a run of one of these methods; on development seeds a name is followed by values."""
    return any(run.method == name or (develop and run.method.startswith(f"{name}, ")) for name in methods)


def listing() -> str:
    """Every configuration with its description and its methods."""
    parts = []
    for name in configuration.available():
        loaded = configuration.load(configuration.find(name))
        names = ", ".join(dict.fromkeys(run.method for run in loaded.runs))
        parts.append(f"{name}\n  {loaded.about}\n  methods: {names}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a run failed, 2 for wrong usage, 130 when interrupted."""
    parser = Parser(prog=f"{PROG} demo", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(arguments=list(sys.argv[1:] if arguments is None else arguments))
    return execute(parser, parser.parse_args(arguments))


def execute(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Does what the options say; `args.arguments` are these options as they were given."""
    try:
        return _run(args, suite.command_line(args.arguments))
    except EWCLoRAError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command continues from here ({args.out})", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace, command: str) -> int:
    if args.list:
        print(listing())
        return 0
    # Checked before hours of training, not when the first picture is drawn.
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(MISSING)
    device_of(args.device)
    place = suite.Place(args.out, args.data_root, args.device, _jobs(args), args.threads, tuple(args.log))
    runs = chosen(args)
    left = suite.outstanding(runs, place)
    place = replace(place, jobs=min(place.jobs, max(len(left), 1)))
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs, {len(left)} of them to do, {place.jobs} at a time", file=sys.stderr)
    counts = [_tasks(run) for run in left]
    progress = Progress(None if None in counts else sum(filter(None, counts)))
    try:
        failures = suite.run_all(left, place, progress, command)
    finally:
        progress.close()
    if COSTS in (args.suite or ()):
        torch.set_num_threads(args.threads)
        for record in costs.measure_all(args.methods, device=args.device, quick=args.quick):
            suite.append(args.out / f"{COSTS}.jsonl", {**record, "command": command})
            print(f"{COSTS}  {record['method']}: task {record['tasks']} / task 1 = "
                  f"{record['ratio_to_first'][-1]:.3f}", file=sys.stderr, flush=True)  # fmt: skip
    _report(args, runs)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _jobs(args: argparse.Namespace) -> int:
    if args.threads < 1 or (args.jobs is not None and args.jobs < 1):
        raise ArgumentError(f"--jobs, --threads: expected integers >= 1, got {args.jobs}, {args.threads}")
    if args.jobs is not None:
        return int(args.jobs)
    if torch.device(args.device).type == "cuda":
        return 1
    return max(1, (os.cpu_count() or 1) // args.threads)


def _tasks(run: Run) -> int | None:
    """The number of tasks, where the problem says it without being loaded."""
    tasks = run.problem.get("tasks")
    return tasks if tasks is None or isinstance(tasks, int) else len(tasks)


def _report(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints tables and draws pictures of all records in the files of these runs."""
    names = list(dict.fromkeys(run.suite for run in runs))
    measurements = [record for name in names for record in records.read(args.out / f"{name}.jsonl")]
    if COSTS in (args.suite or ()):
        measurements += records.read(args.out / f"{COSTS}.jsonl")
    if args.json:
        print(json.dumps(measurements))
        return
    print(summary.overview(measurements))
    for path in pictures.draw(measurements, args.out):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
