# SPDX-License-Identifier: Apache-2.0
"""Executes the runs of configurations that have no record yet, several at a time, and records each."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

from fused_ewclora.demo.environment import timestamp
from fused_ewclora.demo.files import replace_text
from fused_ewclora.errors import ArgumentError, EWCLoRAError

from ..machine import environment
from ..records import read
from . import problems
from .configuration import Run
from .loggers import Loggers, logger_class
from .recorded import check
from .run import execute

Record = dict[str, Any]
POLL = 0.2  # seconds between checks for messages of other processes


@dataclass(frozen=True)
class Place:
    """Where runs happen: folder of records, folder of data, device, processes, CPU threads of each; and which
    loggers they have."""

    out: Path
    root: Path
    device: str = "cpu"
    jobs: int = 1
    threads: int = 1
    log: tuple[str, ...] = ()

    def records(self, suite: str) -> Path:
        """The file of the records of a suite, one JSON object per line."""
        return self.out / f"{suite}.jsonl"

    def checkpoint(self, run: Run) -> Path:
        """The file with the state of an unfinished run."""
        return self.out / "unfinished" / f"{run.suite}-{run.fingerprint()}.pt"


def outstanding(runs: Iterable[Run], place: Place) -> list[Run]:
    """The runs without a record, those with the same problem and seed one after the other, so that it is
    loaded once. Raises `ArgumentError` when a record was made with another configuration: the results of both
    would be averaged."""
    left: list[Run] = []
    for run in runs:
        file = place.records(run.suite)
        previous = [r for r in read(file) if (r["method"], r["seed"]) == (run.method, run.seed)]
        if not previous:
            left.append(run)
        elif previous[-1]["fingerprint"] != run.fingerprint():
            raise ArgumentError(
                f"{file}: {run.method}, seed {run.seed}, was run with another configuration; "
                "remove those lines, or name another folder with --out"
            )
    order = list(dict.fromkeys(run.suite for run in left))
    return sorted(left, key=lambda run: (order.index(run.suite), run.seed))


def run_all(runs: Sequence[Run], place: Place, progress: Callable[[str], None], command: str) -> list[str]:
    """Executes the runs, and appends the record of each to its file as it ends.

    Loggers and the keywords of problems are checked first. progress is called once for every task of a
    stream. Returns a description of every failed run, which does not stop the others. Interrupted runs
    continue from their last task the next time.
    """
    for name in place.log:
        logger_class(name)
    for run in runs:
        problems.checked(run.problem, place.root, run.seed, place.device)
    (place.out / "unfinished").mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    for run, outcome in _outcomes(runs, place, progress):
        if isinstance(outcome, str):
            failures.append(f"{run.suite}: {run.method}, seed {run.seed}: {outcome}")
            continue
        head = {
            "suite": run.suite, "method": run.method, "kind": run.kind, "seed": run.seed,
            "fingerprint": run.fingerprint(), "run": run.to_dict(),
        }  # fmt: skip
        record = {**head, **outcome, "time": timestamp(), "command": command}
        check(record)
        append(place.records(run.suite), record)
        place.checkpoint(run).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: a run failed
        (place.out / "unfinished").rmdir()
    return failures


def append(file: Path, record: Record) -> None:
    """Appends one line; an incomplete last line, left by an interruption, is removed."""
    kept = "".join(f"{json.dumps(old, allow_nan=False)}\n" for old in read(file))
    replace_text(file, f"{kept}{json.dumps(record, allow_nan=False)}\n")


def _outcomes(
    runs: Sequence[Run], place: Place, progress: Callable[[str], None]
) -> Iterator[tuple[Run, Record | str]]:
    """Every run with its results, or with the reason why it failed, in the order in which they end."""
    if place.jobs == 1:
        for run in runs:
            yield run, _run_one(run, place, progress)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    # Ctrl-C ends a worker at once, before it starts the next run; its checkpoints are complete. Where it is
    # ignored, as by background jobs of a shell, workers ignore it as well.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ends = (signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    pool_of = partial(ProcessPoolExecutor, mp_context=context, initializer=signal.signal, initargs=ends)
    with context.Manager() as manager, pool_of(place.jobs) as pool:
        messages: Queue[str] = manager.Queue()
        pending: dict[Future[Record | str], Run] = {}
        try:
            for run in runs:
                pending[pool.submit(_run_one, run, place, messages.put)] = run
            while pending:
                done, _ = wait(pending, timeout=POLL, return_when="FIRST_COMPLETED")
                _report_progress(messages, progress)
                for future in done:
                    yield pending.pop(future), _result(future)
        finally:
            for future in pending:
                future.cancel()


def _report_progress(messages: Queue[str], progress: Callable[[str], None]) -> None:
    with contextlib.suppress(Empty):
        while True:
            progress(messages.get_nowait())


def _result(future: Future[Record | str]) -> Record | str:
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process was killed, perhaps for lack of memory; run the command again"


def _run_one(run: Run, place: Place, progress: Callable[[str], None]) -> Record | str:
    """One run in the current process; the message instead of the results for an error of the library."""
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    try:
        start = time.perf_counter()
        problem = problems.load(run.problem, place.root, run.seed, place.device)
        prepared = time.perf_counter()

        def report_progress(text: str) -> None:
            progress(f"{run.suite}  seed {run.seed}  {run.method:16s}  {text}")

        with contextlib.closing(Loggers(place.log, place.out, run)) as loggers:
            device, checkpoint = torch.device(place.device), place.checkpoint(run)
            outcome = execute(run, problem, device, checkpoint, report_progress, loggers)
        stamp = {**environment(torch.device(place.device).type), "jobs": place.jobs}
        seconds = {"problem": prepared - start, "run": time.perf_counter() - prepared}
        return {**outcome, "seconds": seconds, "environment": stamp}
    except EWCLoRAError as error:
        return str(error)
    finally:
        torch.set_num_threads(before)


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats the runs, without the folders of this machine."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--out")
    places.add_argument("--data-root")
    places.add_argument("--log", nargs="+")
    _, kept = places.parse_known_args(arguments)
    return shlex.join(["python", "-m", "fused_ewclora", "demo", *kept])
