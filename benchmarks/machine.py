# SPDX-License-Identifier: Apache-2.0
"""The machine of a measurement: hardware, versions, and measured ceilings."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_ewclora.demo.environment import installed_version

from .clock import WallClock, clock_of

ROOT = Path(__file__).resolve().parent
# An installed package has no folder of its own for records.
RESULTS = (ROOT if (ROOT.parent / "setup.py").exists() else Path("benchmarks")) / "results"
COMMIT_VARIABLE = "BENCHMARKS_COMMIT"  # for copies of a checkout without its history
Ceilings = dict[str, float]  # "copy": bytes/s read plus written; "fp32", "tf32", "bf16": FLOP/s


def commit() -> str | None:
    """The current commit, with "-dirty" after changes; None where it is unknown."""
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if lines:
            return lines[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, Any]:
    """Machine and versions, as needed to repeat a measurement."""
    description = {
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "fused_ewclora": installed_version("fused-ewclora"),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device != "cuda":
        return description
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "processor": description["device"],
    }
    return {**description, **gpu}


def _median(run: Callable[[], Any], clock: WallClock, seconds: float) -> float:
    return statistics.median(clock.times([clock.prepare([run])], seconds)[0])


def _copy_rate(elements: int, device: str, clock: WallClock, seconds: float) -> float:
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    return 2.0 * source.nbytes / _median(lambda: target.copy_(source), clock, seconds)


def _product_rate(size: int, dtype: torch.dtype, device: str, clock: WallClock, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3 / _median(lambda: torch.mm(left, right, out=out), clock, seconds)


def ceilings(device: str = "cpu", seconds: float = 0.2) -> Ceilings:
    """Bandwidth of a large copy and rates of large square products on random data, measured now."""
    clock = clock_of(device)
    if device == "cpu":
        return {
            "copy": _copy_rate(1 << 24, device, clock, seconds),
            "fp32": _product_rate(1024, torch.float32, device, clock, seconds),
        }
    before = torch.get_float32_matmul_precision()
    with clock.running():
        rates = {"copy": _copy_rate(1 << 29, device, clock, seconds)}  # 2 GiB: no cache holds any of it
        rates["bf16"] = _product_rate(8192, torch.bfloat16, device, clock, seconds)
        for name, precision in (("tf32", "high"), ("fp32", "highest")):
            torch.set_float32_matmul_precision(precision)
            rates[name] = _product_rate(8192, torch.float32, device, clock, seconds)
        torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()
    return rates
