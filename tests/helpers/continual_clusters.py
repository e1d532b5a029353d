# SPDX-License-Identifier: Apache-2.0
"""A problem of clusters of points that every method learns in a moment, and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.run import execute
from benchmarks.continual.stream import Arrays, Problem, Stream, Task

CPU = torch.device("cpu")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoRA", {}),
    "EWC-LoRA": ("EWCLoRA", {"ewc_lambda": 50.0}),
    "EWC-LoRA, factors": ("EWCLoRA", {"ewc_lambda": 50.0, "merge_mode": "factors", "fisher_mode": "batch"}),
    "SD-LoRA-RR": ("SDLoRA", {"ranks": [3, 2, 1]}),
    "SD-LoRA-KD": ("SDLoRA", {"kd_threshold": 0.9}),
    "EWC + SD-LoRA": ("SDLoRA", {"ewc_lambda": 50.0}),
    "CoDyRA": ("CoDyRA", {"kappa_max": 0.05, "gate_init": "normal"}),
    "EWC + CoDyRA": ("CoDyRA", {"kappa_max": 0.05, "ewc_lambda": 50.0}),
    "InfLoRA": ("InfLoRA", {"epsilon": 0.5}),
    "Factor-EWC": ("FactorEWC", {"ewc_lambda": 50.0}),
    "KeepLoRA": ("KeepLoRA", {}),
    "O-LoRA": ("OLoRA", {}),
    "N-LoRA": ("NLoRA", {"lambda_1": 0.01}),
    "P&M": ("PerturbAndMerge", {}),
    "IEL": ("IEL", {"beta": 50.0}),
    "ITA": ("ITA", {"alpha": 50.0}),
    "CL-LoRA": ("CLLoRA", {"shared": ["backbone.up"]}),
}


class Backbone(nn.Module):
    """Of a pair (features, shift), so that inputs of several tensors are exercised."""

    dim = 10

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, self.dim)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, shift = inputs
        return self.down(F.gelu(self.up(x + shift)))


def examples(classes: int, each: int, seed: int) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    centres = 2.0 * torch.randn(classes, 6, generator=generator)
    x = centres[labels] + 0.1 * torch.randn(len(labels), 6, generator=generator)
    return Arrays((x, torch.zeros_like(x)), labels)


def problem(sizes: tuple[int, ...] = (2, 3, 2), each: int = 9) -> Problem:
    tasks = []
    for number, classes in enumerate(sizes):
        names = tuple(f"{number}.{k}" for k in range(classes))
        data = examples(classes, each + number, number)
        tasks.append(Task(names, data, data))
    torch.manual_seed(1)
    return Problem(Stream("clusters", tuple(tasks)), Backbone(), {"made": "for tests"})


def a_run(method: str = "EWC-LoRA", **changes: Any) -> Run:
    kind, options = METHODS[method]
    settings: dict[str, Any] = {
        "training": Training(lr=5e-3, head_lr=5e-2, epochs=3, batch_size=8),
        "problem": {"kind": "clusters", "tasks": 3},
        "adapters": {"r": 3, "target_modules": ["up", "down"]},
        "options": options,
    }
    return Run("clusters", method, kind, 5, **{**settings, **changes})


class Interrupted(Exception):
    pass


def interrupted(run: Run, found: Problem, file: Path) -> None:
    """The run until the second of its tasks has ended, which leaves its state in the file."""

    def stop(text: str) -> None:
        if text.startswith("task 2/"):
            raise Interrupted

    with pytest.raises(Interrupted):
        execute(run, found, CPU, file, stop)
