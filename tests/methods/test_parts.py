# SPDX-License-Identifier: Apache-2.0
"""The methods on linear maps that are parameters of a module equal themselves on linear layers."""

from __future__ import annotations

import pytest
import torch
from part_models import data, layers, loss, pair, register

import fused_ewclora as fe

METHODS = {
    "LoRA": {},
    "EWCLoRA": {"ewc_lambda": 5.0},
    "FactorEWC": {"ewc_lambda": 5.0},
    "SDLoRA": {},
    "SDLoRA-EWC": {"ewc_lambda": 5.0},
    "CoDyRA": {"ewc_lambda": 5.0},
    "InfLoRA": {"total_tasks": 3},
    "KeepLoRA": {"epsilon_w": 0.5, "epsilon_f": 0.6},
    "OLoRA": {"lambda_2": 0.1},
    "NLoRA": {"lambda_1": 0.01},
    "IEL": {"beta": 5.0, "labels": "sampled", "fisher_dtype": torch.float64},
    "ITA": {"alpha": 5.0, "labels": "sampled", "fisher_dtype": torch.float64},
    "PerturbAndMerge": {"fisher_dtype": torch.float64},
}


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    register(monkeypatch)


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_parts(name):
    """Losses, trained values and the exported model, over three tasks."""
    results = []
    for model in pair(lora_alpha=None):
        for layer in layers(model):
            for _, _, lora_b in layer.adapter_parameters():
                lora_b.data.zero_()
        torch.manual_seed(0)
        method = getattr(fe.methods, name.split("-")[0])(model, **METHODS[name])
        values = []
        for task in range(3):
            method.begin_task(task)
            x, y = data(task)
            method.prepare([(x, y)], loss if name == "KeepLoRA" else None)  # labels of others are sampled
            trained = [p for layer in layers(model) for p in layer.parameters() if p.requires_grad]
            for step in range(2):
                value = loss(model(x), y) + method.penalty()
                grads = torch.autograd.grad(value, trained, allow_unused=True)
                with torch.no_grad():
                    for p, grad in zip(trained, grads, strict=True):
                        p -= 0.1 * torch.zeros_like(p) if grad is None else 0.1 * grad
                method.after_step(step, 2)
                values += [value, *(p.detach().clone() for p in trained)]
            for p in trained:
                p.grad = torch.ones_like(p)  # for the check that something was trained
            method.end_task([(x, y)], loss)
        exported = method.export()
        results.append([*values, exported(data(9)[0])])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
