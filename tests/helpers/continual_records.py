# SPDX-License-Identifier: Apache-2.0
"""Made-up records of continual runs and of costs, in the form of the real ones."""

from __future__ import annotations

import copy

import numpy as np

from fused_ewclora.metrics import ContinualMetrics

ENVIRONMENT = {
    "device": "a CPU", "cores": 2, "threads": 1, "torch": "2.13.0", "python": "3.11.7", "commit": "abc",
    "jobs": 2,
}  # fmt: skip


def run(
    method: str = "LoRA",
    seed: int = 0,
    *,
    kind: str = "LoRA",
    tasks: int = 3,
    loss: float = 10.0,
    aware: float = 90.0,
    suite: str = "language",
    options: dict | None = None,
    protocol: dict | None = None,
    sizes: list[int] | None = None,
    epochs: int = 5,
    time: str = "2026-01-01T00:00:00+00:00",
    **more: object,
) -> dict:
    """A record whose tasks lose `loss` points with every later task, up to noise of one point that the seed
    decides."""
    noise = np.random.default_rng(seed).uniform(-1.0, 1.0, (tasks, tasks))
    matrix = [[round(80.0 - loss * (t - i) + noise[t, i], 3) for i in range(t + 1)] for t in range(tasks)]
    knows = [[round(aware - (t - i) * 0.1 + noise[t, i], 3) for i in range(t + 1)] for t in range(tasks)]
    sizes = sizes or [50] * tasks
    found = ContinualMetrics.from_matrix(matrix, sizes, knows, scale=100.0)
    config = {
        "suite": suite, "method": method, "kind": kind, "seed": seed,
        "problem": {"kind": "language", "tasks": tasks}, "adapters": {"r": 8},
        "training": {"lr": 1e-3, "epochs": epochs}, "options": options or {},
    }  # fmt: skip
    if protocol:  # records from before there were protocols have none
        config["protocol"] = protocol
    made = {
        **{name: config[name] for name in ("suite", "method", "kind", "seed")},
        "fingerprint": f"{seed:016x}", "run": config, "facts": {"glosses": 100},
        "classes": [[f"class {2 * t}", f"class {2 * t + 1}"] for t in range(tasks)],
        "train_sizes": [100] * tasks, "test_sizes": sizes,
        "matrices": {"class_incremental": matrix, "task_aware": knows}, "metrics": found.summary(),
        "tasks": [
            {
                "steps": 100, "train_seconds": 10.0, "step_ms": 90.0 + t + seed, "prepare_seconds": 0.0,
                "end_seconds": 2.0 + t, "adapter_parameters": 1000 * (t + 1), "trained_parameters": 1000,
                "state_bytes": 2**20 * (t + 1), "loss": 0.3, "penalty": 0.0,
            }
            for t in range(tasks)
        ],
        "report": None, "environment": ENVIRONMENT, "time": time,
        "command": "python -m fused_ewclora demo --suite language",
    }  # fmt: skip
    return {**made, **more}


def changed(record: dict, path: str, value: object) -> dict:
    """A copy with another value at a path such as "matrices.task_aware.1"; None removes it."""
    made = copy.deepcopy(record)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = made
    for part in way:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return made


def ewc(ewc_lambda: float, seed: int = 0, **more: object) -> dict:
    name = f"EWC-LoRA {ewc_lambda:g}"
    options = {"ewc_lambda": ewc_lambda, "fisher_mode": "batch"}
    return run(**{"method": name, "seed": seed, "kind": "EWCLoRA", "options": options, **more})


def cost(method: str, growth: float = 0.0, tasks: int = 10, **more: object) -> dict:
    ratios = [1.0 + growth * t for t in range(tasks)]
    made = {
        "cost": "step", "method": method, "kind": "SDLoRA", "options": {},
        "model": {"dim": 384, "blocks": 3, "tokens": 50, "batch": 16, "rank": 10}, "tasks": tasks,
        "step_seconds": [{"p20": 0.09 * r, "p50": 0.1 * r, "p80": 0.12 * r} for r in ratios],
        "ratio_to_first": ratios, "step_peak_bytes": [int(2e8 * r) for r in ratios],
        "state_bytes": [int(1e6 * (1 + growth * t * 20)) for t in range(tasks)],
        "adapter_parameters": [int(46080 * (1 + growth * t * 20)) for t in range(tasks)], "rounds": 30,
        "environment": ENVIRONMENT, "time": "2026-01-01T00:00:00+00:00",
        "command": "python -m fused_ewclora demo --suite costs",
    }  # fmt: skip
    return {**made, **more}
