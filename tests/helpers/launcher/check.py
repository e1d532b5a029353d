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
from ptx.cases import error_of
from ptx.launches import tensors

from fused_ewclora.backends.triton import launch

from . import calls, execution, memory, stub, triton_launcher
from .comparison import Buffers, differences

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
        users = [call for dtype in dtypes for call in calls.user_calls(dtype)]
        for call in (*users, *calls.host_calls(arch, dtypes, options.rank)):
            if options.kernel and not any(name in call.name for name in options.kernel):
                continue
            if options.case and call.name not in options.case:
                continue
            found = triton_launcher.activate(arch)
            found.set(version=options.driver)
            yield compared(call, arch, found)
            if options.execute and arch in EXECUTED:
                yield executed(call, arch)


def compared(call: calls.Call, arch: str, driver: stub.Stub) -> dict[str, Any]:
    """One call by a plan and by Triton's launcher: the launches of both, and what is not the same."""
    given = call.arguments()
    arguments = call.others(given)
    with call.precision_set(), ExitStack() as held:
        held.enter_context(calls.pretending(arch))
        calls.record(call, given)
        driver.set(noting=1)
        held.callback(driver.set, noting=0)
        first = len(driver.launches())
        with memory.held(), launch.handing(arch, triton_launcher.run):
            call.run(arguments)
            made = memory.blocks()
        expected = driver.launches(first)
        with memory.held():
            call.run(arguments)
            made_by_plan = memory.blocks()
        got = driver.launches(first + len(expected))
    buffers = [Buffers.of(tensors(list(arguments)), one) for one in (made, made_by_plan)]
    found = list(differences(expected, buffers[0], got, buffers[1]))
    return {
        "arch": arch, "case": call.name, "executed": False, "right": bool(expected) and not found,
        "launches": [one.function for one in expected], "findings": found,
    }  # fmt: skip


def executed(call: calls.Call, arch: str) -> dict[str, Any]:
    """One call by a plan, executed by the PTX machine and compared with fp64."""
    session = execution.Session(arch)
    given = call.arguments()
    arguments = call.others(given)
    exact = call.exact(arguments)
    observe = session.unobserved if isinstance(call, calls.UserCall) else session.memory
    with call.precision_set(), calls.pretending(arch), observe(*given, *arguments):
        calls.record(call, given)
        with session.executing():
            got = call.run(arguments)
    error = max(error_of(a.detach(), b.detach()) for a, b in zip(got, exact, strict=True))
    launches, findings = [report.kernel.name for report in session.reports], session.findings()
    right = bool(launches) and not findings and error <= call.allowed()
    return {
        "arch": arch, "case": call.name, "executed": True, "right": right, "launches": launches,
        "findings": findings, "error": error, "allowed": call.allowed(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the table, and what was found."""
    told = f"error {row['error']:.1e} (allowed {row['allowed']:.0e})" if row["executed"] else "compared"
    right = "right" if row["right"] else "WRONG"
    return "\n    ".join(
        [f"{right}  {row['arch']}  {row['case']:62}  launches {len(row['launches'])}  {told}", *row["findings"][:4]]
    )


if __name__ == "__main__":
    memory.preload("launcher.check", sys.argv[1:])
    raise SystemExit(main())
