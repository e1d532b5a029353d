"""Runs the microbenchmarks of the CPU: `python -m benchmarks [--suite NAME ...] [--threads N]`; exit status 1
when a target is missed or a result wrong."""

from __future__ import annotations

import argparse
import datetime
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Inductor's compile workers start in the background and would take a core from what is timed first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from . import ewc_penalty, fisher_accumulate, lora_linear
from .case import Case
from .harness import append, measure, verdicts
from .machine import ROOT, ceilings, environment

SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "ewc_penalty": ewc_penalty.cases,
    "fisher_accumulate": fisher_accumulate.cases,
    "lora_linear": lora_linear.cases,
}


def show(case: Case, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """A table of one case: time, ratio to each peer, rate, error, then its targets."""
    print(f"\n{case.op}  {', '.join(f'{k} {v}' for k, v in case.shape.items())}  {case.dtype}")
    ours = next(
        (r["seconds"]["p50"] for r in records if r["provider"] == case.ours and "seconds" in r), math.nan
    )
    heads = f"{'p50 ms':>9}{'p20':>9}{'p80':>9}{'peer/ours':>11}{'GFLOP/s':>9}{'GB/s':>7}{'error':>10}"
    print(f"  {'provider':34}{heads}")
    for r in records:
        if "failed" in r:
            print(f"  {r['provider']:34}{r['failed']}")
            continue
        s = {key: value * 1e3 for key, value in r["seconds"].items()}
        error = "floor" if r["error_fp64"] is None else f"{r['error_fp64']:.1e}"
        print(
            f"  {r['provider']:34}{s['p50']:9.3f}{s['p20']:9.3f}{s['p80']:9.3f}{s['p50'] / 1e3 / ours:11.2f}"
            f"{r['gflops_per_second']:9.1f}{r['gbytes_per_second']:7.1f}{error:>10}"
        )
    for row in rows:
        verdict = "PASS" if row["met"] else "FALL SHORT"
        print(f"  {verdict}: {row['target']} (ratio {row['ratio']:.3f}, limit {row['limit']:.3f})")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", nargs="*", choices=sorted(SUITES), default=sorted(SUITES))
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of all providers"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time per provider and case")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "cpu", help="folder the records are appended to"
    )
    parser.add_argument("--dry", action="store_true", help="measure and print without writing records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    stamp = {"environment": environment(), "time": now}
    failed = False
    for suite in args.suite:
        for case in SUITES[suite]():
            records = measure(case, args.seconds, ceilings("cpu"))
            rows = verdicts(case, records)
            show(case, records, rows)
            failed |= any(not row["met"] for row in rows) or any("failed" in r for r in records)
            if not args.dry:
                append(args.output / f"{suite}.jsonl", records, {**stamp, "targets": rows})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
