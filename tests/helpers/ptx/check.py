# SPDX-License-Identifier: Apache-2.0
"""Executes every kernel, configuration family and algorithm on the machine, and prints a table.

python -m ptx.check [--arch sm_90 ...] [--kernel NAME ...] [--dtype bfloat16 ...] [--rank 10 ...] [--seeds 1]
python -m ptx.check --cuda [--kernel NAME ...] [--seeds 1]    csrc/cuda, as nvcc compiles it for sm_80
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import cases, machine
from .launches import Session

ARCHITECTURES = ("sm_80", "sm_90")


def main() -> int:
    parser = argparse.ArgumentParser(prog="ptx-check", description=__doc__)
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="*", default=(), help="ops whose name contains one of these")
    parser.add_argument("--dtype", nargs="*", default=("bfloat16", "float32"))
    parser.add_argument("--rank", nargs="*", type=int, default=(10,))
    parser.add_argument("--seeds", type=int, default=1, help="interleavings of warps and blocks per case")
    parser.add_argument("--case", nargs="*", default=(), help="names of calls, as the table gives them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cuda", action="store_true", help="execute csrc/cuda instead of Triton's kernels")
    parser.add_argument("--resident", type=int, default=6, help="blocks that run at the same time")
    options = parser.parse_args()
    machine.module()
    rows, started = [], time.perf_counter()
    for execute in _cuda(options) if options.cuda else _triton(options):
        for seed in range(options.seeds):
            # Of several interleavings one has but two blocks at a time.
            rows.append(row(execute(seed, 2 if seed % 2 else options.resident), seed))
            if not options.json:
                print(line(rows[-1]), flush=True)
    if options.json:
        json.dump(rows, sys.stdout)
        return 0
    wrong = sum(not found["right"] for found in rows)
    print(f"{len(rows)} calls executed, {wrong} wrong, {time.perf_counter() - started:.0f} s")
    return int(wrong > 0 or not rows)


Execute = Callable[[int, int], Any]  # of a seed and blocks at a time: an outcome


def _triton(options: argparse.Namespace) -> Iterator[Execute]:
    dtypes = [getattr(torch, name) for name in options.dtype]
    for arch in options.arch:
        for case in cases.cases(arch, dtypes, options.rank):
            if options.kernel and not any(name in case.name for name in options.kernel):
                continue
            if not options.case or case.name in options.case:
                yield lambda seed, resident, arch=arch, case=case: case.execute(Session(arch, seed, resident))


def _cuda(options: argparse.Namespace) -> Iterator[Execute]:
    import cuda_emulator

    from . import cuda_cases, cuda_launches

    if (reason := cuda_emulator.install() or cuda_launches.missing()) is not None:
        raise SystemExit(f"csrc/cuda cannot be executed: {reason}")
    for name in cuda_cases.names():
        if options.kernel and not any(part in name for part in options.kernel):
            continue
        if not options.case or name in options.case:
            yield lambda seed, resident, name=name: cuda_cases.execute(
                name, cuda_launches.Session(seed=seed, resident=resident)
            )


def row(outcome: Any, seed: int) -> dict[str, Any]:
    """The outcome as plain data."""
    reports = outcome.session.reports
    return {
        "arch": outcome.session.arch, "case": outcome.case, "seed": seed, "right": outcome.right,
        "error": outcome.error, "allowed": outcome.allowed, "bits": outcome.bits,
        "launches": len(reports), "kernels": sorted({r.kernel.name for r in reports}),
        "instructions": sum(r.steps for r in reports), "seconds": sum(r.seconds for r in reports),
        "findings": outcome.findings,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """One row of the table, and what was found."""
    told = (
        f"{'right' if found['right'] else 'WRONG'}  {found['arch']}  {found['case']:62}"
        f"  error {found['error']:.1e} (allowed {found['allowed']:.0e})  launches {found['launches']}"
        f"  instructions {found['instructions']}  {found['seconds']:.1f} s"
    )
    return "\n    ".join([told, *found["findings"][:4]])


if __name__ == "__main__":
    raise SystemExit(main())
