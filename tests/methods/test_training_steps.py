# SPDX-License-Identifier: Apache-2.0
"""What a training step of every method costs: the LoRA linears it runs, and the memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_and_largest
from torch import nn

import fused_ewclora as fe
from fused_ewclora import methods
from fused_ewclora.methods import IEL, CLLoRA, Method

WIDTH, SAMPLES, RANK, TASKS = 512, 8, 2, 3
WEIGHT = 4 * WIDTH * WIDTH  # bytes
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoRA", {}),
    "EWC-LoRA": ("EWCLoRA", {"ewc_lambda": 10.0}),
    "EWC-LoRA, factored Fisher": ("EWCLoRA", {"ewc_lambda": 10.0, "fisher": "factored"}),
    "Factor-EWC": ("FactorEWC", {"ewc_lambda": 10.0}),
    "SD-LoRA": ("SDLoRA", {}),
    "SD-LoRA, norms of factors": ("SDLoRA", {"normalization": "factors"}),
    "SD-LoRA, shared": ("SDLoRA", {"magnitudes": "shared"}),
    "SD-LoRA with EWC": ("SDLoRA", {"ewc_lambda": 10.0}),
    "CoDyRA": ("CoDyRA", {"kappa_max": 0.01, "gate_init": "normal"}),
    "CoDyRA with EWC": ("CoDyRA", {"kappa_max": 0.01, "gate_init": "normal", "ewc_lambda": 10.0}),
    "InfLoRA": ("InfLoRA", {"epsilon": 0.5}),
    "KeepLoRA": ("KeepLoRA", {"epsilon_w": 0.3}),
    "KeepLoRA, official": ("KeepLoRA", {"epsilon_w": 0.3, "variant": "official"}),
    "O-LoRA": ("OLoRA", {}),
    "O-LoRA, official": ("OLoRA", {"variant": "official", "lambda_2": 0.1}),
    "N-LoRA": ("NLoRA", {"lambda_1": 0.01}),
    "N-LoRA, official": ("NLoRA", {"lambda_1": 0.01, "variant": "official"}),
    "IEL": ("IEL", {"beta": 10.0}),
    "IEL, official": ("IEL", {"beta": 10.0, "variant": "official"}),
    "ITA": ("ITA", {"alpha": 10.0}),
    "P&M": ("PerturbAndMerge", {}),
    "CL-LoRA": ("CLLoRA", {"shared": ["0"]}),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def step(method: Method, x: torch.Tensor, y: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    if isinstance(method, CLLoRA) and method.tasks:
        method.distillation(x, method.model[0]).backward()  # type: ignore[index]
        method.reassign_()
    loss = F.cross_entropy(method.model(x), y)
    if isinstance(method, IEL) and method.variant == "official":
        loss.backward()
        method.decoupled_step_()
    else:
        (loss + method.penalty()).backward()
    optimizer.step()
    method.after_step(0, 2)


def linears(run: Any) -> int:
    """How often the LoRA linear ran."""
    with torch.profiler.profile() as profiler:
        run()
    return sum(event.count for event in profiler.key_averages() if event.key == "fused_ewclora::lora_linear")


def test_every_method_is_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(methods.__all__) - {"Method"}


@pytest.mark.parametrize("name", CASES)
def test_step_of_every_task(name: str) -> None:
    """In every task a step runs one LoRA linear per layer, and allocates nothing of the size of a weight."""
    torch.set_num_threads(1)
    kind, options = CASES[name]
    config = fe.LoRAConfig(r=RANK, target_modules=["0", "2"])
    method: Method = getattr(methods, kind)(network(), config, **options)
    for task in range(TASKS):
        x, y = torch.randn(SAMPLES, WIDTH), torch.randint(3, (SAMPLES,))
        method.begin_task(task)
        method.prepare([(x, y)])
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
        step(method, x, y, optimizer)  # what is made once
        _, largest = peak_and_largest(lambda: step(method, x, y, optimizer))  # noqa: B023
        assert largest <= WEIGHT // 8, f"task {task}: {largest} bytes"
        distilled = 2 if kind == "CLLoRA" and task else 0  # student and teacher run the shared layer alone
        assert linears(lambda: step(method, x, y, optimizer)) == 2 + distilled  # noqa: B023
        method.end_task([(x, y)])
    whole = peak_and_largest(lambda: method.model[0].weight + 1.0)  # type: ignore[index]
    assert whole[1] == WEIGHT  # what the measurement would see
