"""Checks every provider against fp64, times them interleaved, and appends one JSON record per provider."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .case import Case, Provider

ROOT = Path(__file__).resolve().parent
MIN_ROUNDS, MAX_ROUNDS = 7, 60


def environment() -> dict[str, Any]:
    """Everything about the machine and the versions that a reader needs to rerun a record."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "device": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fused_ewclora": importlib.metadata.version("fused-ewclora"),
        "python": platform.python_version(),
        "commit": commit or None,
    }


def error_to_truth(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest relative error of a result, each in its own norm."""
    if len(results) != len(truth):
        return math.inf
    errors = []
    for result, expected in zip(results, truth, strict=True):
        difference = (result.detach().double() - expected.double()).norm()
        errors.append(float(difference / expected.double().norm().clamp_min(1e-300)))
    return max(errors)


def interleaved(runs: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Times of each run, taken in turns so that every variant sees the same machine."""
    for run in runs:
        run()
        run()
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or (
        time.perf_counter() - begin < seconds * len(runs) and len(times[0]) < MAX_ROUNDS
    ):
        for run, samples in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
    return times


def sgemm_rate(seconds: float = 0.5) -> float:
    """FLOP/s of one large fp32 product: the measured ceiling of this run."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    times = interleaved([lambda: a @ b], seconds)[0]
    return 2.0 * 2048 * 1024 * 1024 / statistics.median(times)


def _record(
    case: Case, provider: Provider, error: float | None, times: list[float], ceiling: float
) -> dict[str, Any]:
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "provider": provider.name,
        "backend": provider.backend,
        "algorithm": provider.algorithm,
        "floor": provider.floor,
        "error_fp64": error,
        "seconds": {"p20": p20, "p50": p50, "p80": p80},
        "rounds": len(times),
        "flops": case.flops,
        "bytes": case.bytes,
        "gflops_per_second": case.flops / p50 / 1e9,
        "gbytes_per_second": case.bytes / p50 / 1e9,
        "fraction_of_sgemm": case.flops / p50 / ceiling,
        "sgemm_gflops_per_second": ceiling / 1e9,
    }


def measure(case: Case, seconds: float, ceiling: float) -> list[dict[str, Any]]:
    """Records of the providers of one case. A provider that fails or is wrong is recorded with its reason and
    never timed."""
    truth = [t.detach() for t in case.truth()]
    records: list[dict[str, Any]] = []
    sound: list[tuple[Provider, float | None]] = []
    for provider in case.providers:
        common = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "provider": provider.name}
        try:
            results = provider.run()
        except (RuntimeError, MemoryError) as failure:
            records.append({**common, "failed": f"{type(failure).__name__}: {failure}"[:400]})
            continue
        error = None if provider.floor else error_to_truth(results, truth)
        if error is not None and not error <= case.tolerance:
            wrong = f"wrong: error {error:.3g} against fp64, allowed {case.tolerance:.3g}"
            records.append({**common, "failed": wrong})
            continue
        sound.append((provider, error))
    times = interleaved([provider.run for provider, _ in sound], seconds)
    records += [_record(case, p, error, t, ceiling) for (p, error), t in zip(sound, times, strict=True)]
    return records


def verdicts(case: Case, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per target: ratio of our median to the peer's, the limit, and whether it is met."""
    medians = {r["provider"]: r["seconds"]["p50"] for r in records if "seconds" in r}
    rows = []
    for target in case.targets:
        peers = (
            [name for name in medians if name != case.ours] if target.peer == "best peer" else [target.peer]
        )
        floors = {p.name for p in case.providers if p.floor}
        if target.peer == "best peer":
            peers = [name for name in peers if name not in floors]
        times = [medians[name] for name in peers if name in medians]
        ratio = medians[case.ours] / min(times) if times and case.ours in medians else math.nan
        rows.append(
            {"target": target.name, "ratio": ratio, "limit": target.limit, "met": ratio <= target.limit}
        )
    return rows


def append(path: Path, records: Sequence[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Adds the records to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({**record, **extra}) + "\n")
