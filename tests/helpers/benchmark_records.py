# SPDX-License-Identifier: Apache-2.0
"""Records of benchmarks in the formats of the CPU and of GPUs, and folders of them."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.case import OURS

CPU = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "python": "3.11.7", "commit": "abc"}


GPU = {**CPU, "device": "a GPU", "cuda": "13.0", "capability": "9.0"}


def record(provider: str, seconds: float, width: int = 8, **more: object) -> dict:
    """In the format of older CPU records, which hold neither roles nor ceilings."""
    made = {
        "op": "penalty", "shape": {"model": f"m{width}", "width": width}, "dtype": "float32",
        "provider": provider, "backend": "", "algorithm": "", "floor": provider == "product",
        "error_fp64": None if provider == "product" else 1e-7, "rounds": 30,
        "seconds": {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.2 * seconds},
        "flops": 4e9, "bytes": 1e8, "gflops_per_second": 4 / seconds, "gbytes_per_second": 0.1 / seconds,
        "fraction_of_sgemm": 0.02 / seconds, "sgemm_gflops_per_second": 200.0,
        "environment": CPU, "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return {**made, **more}


def older() -> list:
    targets = [
        {"target": "2 x faster than eager", "ratio": 0.25, "limit": 0.5, "met": True},
        {"target": "at most the product", "ratio": 2.0, "limit": 1.0, "met": False},
    ]
    times = {OURS: 0.05, "eager": 0.2, "product": 0.025}
    return [record(n, t, w, targets=targets) for w in (8, 16) for n, t in times.items()]


def newer(**more: object) -> list:
    kept = ("op", "shape", "dtype", "environment", "time")
    made = []
    for one in older():
        for name in ("fraction_of_sgemm", "sgemm_gflops_per_second", "targets"):
            del one[name]
        ours = one["provider"] == OURS
        role = "ours" if ours else "floor" if one["floor"] else "peer"
        predicted = 0.04 if ours else None
        one |= {
            "role": role, "ceilings": {"copy": 1e10, "fp32": 2e11}, "fraction_of_ceiling": 0.4,
            "environment": GPU, "predicted_seconds": predicted, "host_seconds": 1e-5, "timing": "graph",
        }  # fmt: skip
        failed = {**{name: one[name] for name in kept}, "provider": "broken", "role": "peer",
                  "failed": "RuntimeError: <shape> a|b"}  # fmt: skip
        made += [{**one, **more}] + ([failed] if ours else [])
    return made


def results(folder: Path, **suites: list) -> Path:
    for name, found in suites.items():
        device, _, suite = name.partition("_")
        (folder / device).mkdir(parents=True, exist_ok=True)
        (folder / device / f"{suite}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return folder
