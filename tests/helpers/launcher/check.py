# SPDX-License-Identifier: Apache-2.0
"""Compares what plans hand the CUDA driver with what Triton's own launcher hands it, for the calls of the
compile report, and executes it on the PTX machine.

python -m launcher.check [--arch sm_90 ...] [--kernel NAME ...] [--dtype bfloat16 ...] [--rank 10 ...]
[--execute]
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

from . import calls, execution, memory, triton_launcher
from .comparison import Buffers, differences

MOST = 6  # findings of a call that are told
EXECUTED = ("sm_80", "sm_90")  # what the PTX machine knows


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher-check", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=("sm_90",), choices=triton_launcher.ARCHITECTURES)
    parser.add_argument("--kernel", nargs="*", default=(), help="ops whose name contains one of these")
    parser.add_argument("--dtype", nargs="*", default=("bfloat16", "float32"))
    parser.add_argument("--rank", nargs="*", type=int, default=(10,))
    parser.add_argument(
        "--case", nargs="*", default=(), help='calls, as the table names them: "sm_90 merge_ ..."'
    )
    parser.add_argument(
        "--driver", nargs="*", type=int, default=(13000,), help="versions that the driver says it has"
    )
    parser.add_argument(
        "--execute",
        nargs="*",
        help="execute what the plans hand over, as well, of all calls or of those named",
    )
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
            name = f"{arch} {call.name}"
            if options.case and name not in options.case:
                continue
            for version in options.driver:
                yield compared(call, arch, version)
            if options.execute is None or (options.execute and name not in options.execute):
                continue
            if arch in EXECUTED:
                yield executed(call, arch)


def compared(call: calls.Call, arch: str, version: int) -> dict[str, Any]:
    """One call by a plan and by Triton's launcher, with a driver of some version: the launches of both,
    and what is not the same."""
    driver = triton_launcher.activate(arch)
    driver.set(version=version)
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
        "arch": arch, "case": call.name, "executed": False, "driver": version,
        "right": bool(expected) and not found,
        "launches": [one.function for one in expected], "findings": found[:MOST],
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
        "findings": findings[:MOST], "error": error, "allowed": call.allowed(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the table, and what was found."""
    told = f"error {row['error']:.1e} (allowed {row['allowed']:.0e})" if row["executed"] else "compared"
    right = "right" if row["right"] else "WRONG"
    return "\n    ".join(
        [
            f"{right}  {row['arch']}  {row['case']:62}  launches {len(row['launches'])}  {told}",
            *row["findings"],
        ]
    )


if __name__ == "__main__":
    memory.preload("launcher.check", sys.argv[1:])
    raise SystemExit(main())
