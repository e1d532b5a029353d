# SPDX-License-Identifier: Apache-2.0
"""Tries configurations of the kernels that targets depend on: `python -m benchmarks.gpu.tune --out DIR`.

The keys are those that the deciding calls look up; around the shipped configuration of each, one step in
every direction is tried, so that all candidates can be compiled beforehand (`benchmarks.gpu.cache`). The best
are written to DIR/tuned.<family>.json, in the format of the shipped tables, and nothing else is changed.
Exit status 1 when a shipped configuration fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_ewclora.backends.candidate import Candidate, arch_of
from fused_ewclora.backends.triton import launch, tables
from fused_ewclora.backends.triton.tables import Key
from fused_ewclora.backends.triton.tools import autotune
from fused_ewclora.backends.triton.tools.workloads import VIT_L, Workload, noted, workloads

MOST = 10  # keys
PREFERRED = {"full", "prologue"}  # algorithms of the LoRA linear
SIZES = VIT_L._replace(layers=48)  # k and v of the whole model in one penalty
BF16, FP32 = torch.bfloat16, torch.float32


class Deciding(NamedTuple):
    """Calls that targets depend on: op and kind of a workload, dtype, rank, matmul precision."""

    op: str
    kind: str
    dtype: torch.dtype = BF16
    rank: int = 16
    precision: str = "highest"


DECIDING = (
    Deciding("lora_linear", "fc1"),
    Deciding("lora_linear_backward", "fc1"),
    Deciding("ewc_penalty", "fp32 F", FP32, 10, "high"),
    Deciding("ewc_penalty", "fp32 F", FP32, 10, "highest"),
    Deciding("fisher_accumulate_", "sample", rank=0),
)


@functools.cache
def _workloads() -> tuple[Workload, ...]:
    return tuple(workloads((BF16, FP32), (16, 10), SIZES))


@functools.cache
def _asked(arch: str) -> tuple[tuple[Workload, Candidate, tuple[Key, ...]], ...]:
    """The deciding calls, each with its algorithms and what they look up."""
    found = []
    for one in DECIDING:
        (workload,) = {
            w.name: w for w in _workloads() if (w.op, w.kind, w.dtype, w.rank, w.precision) == tuple(one)
        }.values()
        for candidate, _, keys in noted(workload, arch):
            found.append((workload, candidate, tuple(dict.fromkeys(keys))))
    return tuple(found)


def keys(arch: str) -> list[Key]:
    """What the deciding calls look up, those of most kernels' time first."""
    found = dict.fromkeys(key for _, _, keys in _asked(arch) for key in keys)
    last = ("lowrank_pack_kernel", "lowrank_sum_kernel", "fisher_square_kernel")  # small launches
    return sorted(found, key=lambda key: (key.kernel in last, key.kernel.endswith(":no_base")))[:MOST]


def asking(key: Key) -> list[tuple[Workload, Candidate]]:
    """The deciding calls that look `key` up, by the algorithms that are preferred where one of those does."""
    found = [(workload, candidate) for workload, candidate, keys in _asked(key.arch) if key in keys]
    return [one for one in found if not one[1].keys or PREFERRED & {*one[1].keys}] or found


def candidates(key: Key) -> list[dict[str, Any]]:
    """The shipped configuration and those around it."""
    shipped = dict(tables.shipped(key)["config"])
    return [shipped, *autotune.neighbours(shipped)]


def tuned(key: Key, device: torch.device, end: float, timer: autotune.Timer) -> autotune.Tuned:
    """The best of the candidates, as far as time reaches."""
    runs: list[autotune.Run] = []
    for workload in {w.name: w for w, _ in asking(key)}.values():
        algorithms = [candidate for other, candidate in asking(key) if other.name == workload.name]
        runs += autotune.prepared(workload, algorithms, device)
    return autotune.tune(key, runs, timer, len(candidates(key)), end)


def told(key: Key, result: autotune.Tuned) -> str:
    """One line about a key."""
    shipped = candidates(key)[0]
    changes = {k: v for k, v in result.entry["config"].items() if shipped.get(k) != v}
    what = ", ".join(f"{k} {shipped[k]} -> {v}" for k, v in changes.items()) or "as shipped"
    refused = sum(trial.reason is not None for trial in result.trials)
    tries = f"{len(result.trials)} of {len(candidates(key))} tried, {refused} refused"
    return f"{key.kernel}, {key.dtype}, rank {key.rank}: {what}; {result.entry['source']} ({tries})"


def run(arch: str, device: torch.device, out: Path, budget: float, timer: autotune.Timer) -> int:
    """Tunes key after key within `budget` seconds; returns the exit status."""
    end, entries, failed = time.monotonic() + budget, [], 0
    left = keys(arch)
    while left and time.monotonic() < end:
        key = left.pop(0)
        share = time.monotonic() + 2.0 * (end - time.monotonic()) / (len(left) + 2)
        try:
            result = tuned(key, device, min(share, end), timer)
        except Exception as failure:
            failed += 1
            print(f"{key.kernel}, {key.dtype}, rank {key.rank}: {' '.join(str(failure).split())[:300]}")
            continue
        print(told(key, result), flush=True)
        entries.append(dict(result.entry))
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        (out / f"tuned.{launch.family(arch)}.json").write_text(f'{{"entries": [\n  {lines}\n]}}\n')
    for key in left:
        print(f"{key.kernel}, {key.dtype}, rank {key.rank}: not reached in {budget:.0f} s")
    return int(failed > 0)


def rehearsal(out: Path, budget: float) -> int:
    """On the CPU: every key and its candidates are named, one is tuned by a clock that prefers few warps."""
    calls: dict[int, float] = {}

    def timer(run: Callable[[], Any]) -> float:
        return calls.setdefault(len(calls), 1e-3 / (1 + len(calls)))

    for key in keys("sm_90"):
        print(f"{key.kernel}, {key.dtype}, rank {key.rank}: {len(candidates(key))} candidates")
    shipped = keys("sm_90")[0]
    trials = autotune.search(candidates(shipped)[0], lambda config: autotune.Trial(config, timer(dict)), 3)
    entry = {"kernel": shipped.kernel, "config": trials[0].config, "source": "a rehearsal"}
    (out / "tuned.rehearsal.json").write_text(json.dumps({"entries": [entry]}))
    return 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--budget", type=float, default=60.0, help="no trial starts after so many seconds")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without measuring")
    args = parser.parse_args()
    if args.rehearse:
        return rehearsal(args.out, args.budget)
    device = torch.device("cuda", torch.cuda.current_device())
    return run(str(arch_of(device)), device, args.out, args.budget, autotune.time_on_gpu)


if __name__ == "__main__":
    raise SystemExit(main())
