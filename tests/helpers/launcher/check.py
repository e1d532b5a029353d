"""Compares what plans hand the CUDA driver with what Triton's own launcher hands it, for the calls of the compile
report, and executes it on the PTX machine.

python -m launcher.check [--arch sm_90 ...] [--kernel NAME ...] [--dtype bfloat16 ...] [--rank 10 ...] [--execute]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from ptx.cases import Case, cases
from ptx.launches import tensors

from fused_ewclora.backends.triton import launch

from . import execution, planned, stub, triton_launcher
from .comparison import Buffers, Made, differences

EXECUTED = ("sm_80", "sm_90")  # what the PTX machine knows


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher-check", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=("sm_90",), choices=triton_launcher.ARCHITECTURES)
    parser.add_argument("--kernel", nargs="*", default=(), help="ops whose name contains one of these")
    parser.add_argument("--dtype", nargs="*", default=("bfloat16", "float32"))
    parser.add_argument("--rank", nargs="*", type=int, default=(10,))
    parser.add_argument("--case", nargs="*", default=(), help="names of calls, as the table gives them")
    parser.add_argument("--driver", type=int, default=13000, help="the version that the driver says it has")
    parser.add_argument("--execute", action="store_true", help="execute what the plans hand over, as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, started = [], time.perf_counter()
    for row in _rows(options):
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        json.dump(rows, sys.stdout)
        return 0
    wrong = sum(not row["right"] for row in rows)
    print(f"{len(rows)} calls, {wrong} wrong, {time.perf_counter() - started:.0f} s")
    return int(wrong > 0 or not rows)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    execution.watch_compiler()
    dtypes = [getattr(torch, name) for name in options.dtype]
    for arch in options.arch:
        for case in cases(arch, dtypes, options.rank):
            if options.kernel and not any(name in case.name for name in options.kernel):
                continue
            if options.case and case.name not in options.case:
                continue
            found = triton_launcher.activate(arch)
            found.set(version=options.driver)
            yield compared(case, arch, found)
            if options.execute and arch in EXECUTED:
                yield executed(case, arch)


def compared(case: Case, arch: str, driver: stub.Stub) -> dict[str, Any]:
    """One call by a plan and by Triton's launcher: the launches of both, and what is not the same."""
    given = case.arguments()
    arguments = planned.others(case, given)
    with case.workload.precision_set(), ExitStack() as held:
        held.enter_context(planned.pretending(arch))
        planned.record(case, given)
        driver.set(noting=1)
        held.callback(driver.set, noting=0)
        first = len(driver.launches())
        with Made() as made, launch.handing(arch, triton_launcher.run):
            case.candidate.run(*arguments)
        expected = driver.launches(first)
        with Made() as made_by_plan:
            case.candidate.run(*arguments)
        got = driver.launches(first + len(expected))
    buffers = [Buffers.of(tensors(list(arguments)), one.tensors) for one in (made, made_by_plan)]
    found = list(differences(expected, buffers[0], got, buffers[1]))
    return {
        "arch": arch, "case": case.name, "executed": False, "right": bool(expected) and not found,
        "launches": [one.function for one in expected], "findings": found,
    }  # fmt: skip


def executed(case: Case, arch: str) -> dict[str, Any]:
    """One call by a plan, executed by the PTX machine and compared with fp64."""
    session = execution.Session(arch)
    given = case.arguments()
    arguments = planned.others(case, given)
    exact = case.exact(arguments)
    with case.workload.precision_set(), planned.pretending(arch), session.memory(*given, *arguments):
        planned.record(case, given)
        with session.executing():
            got = case.run(arguments)
    outcome = case.outcome(session, got, exact)
    launches = [report.kernel.name for report in session.reports]
    return {
        "arch": arch, "case": case.name, "executed": True, "right": bool(launches) and outcome.right,
        "launches": launches, "findings": outcome.findings, "error": outcome.error,
        "allowed": outcome.allowed,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the table, and what was found."""
    told = f"error {row['error']:.1e} (allowed {row['allowed']:.0e})" if row["executed"] else "compared"
    right = "right" if row["right"] else "WRONG"
    return "\n    ".join(
        [f"{right}  {row['arch']}  {row['case']:62}  launches {len(row['launches'])}  {told}", *row["findings"][:4]]
    )


if __name__ == "__main__":
    raise SystemExit(main())
