# SPDX-License-Identifier: Apache-2.0
"""The methods on convolutions equal themselves on linear layers that are given the windows as rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe

METHODS = {
    "LoRA": {},
    "EWCLoRA": {"ewc_lambda": 5.0},
    "EWCLoRA-factors": {"ewc_lambda": 5.0, "merge_mode": "factors"},
    "FactorEWC": {"ewc_lambda": 5.0},
    "FactorEWC-batch": {"ewc_lambda": 5.0, "fisher_mode": "batch"},
    "SDLoRA": {},
    "SDLoRA-EWC": {"ewc_lambda": 5.0},
    "SDLoRA-ranks": {"ranks": (2, 1), "kd_threshold": 1e-3},
    "CoDyRA": {"ewc_lambda": 5.0},
    "InfLoRA": {"total_tasks": 3},
    "KeepLoRA": {"epsilon_w": 0.5, "epsilon_f": 0.6},
    "CLLoRA": {"shared": ["first"], "orthogonality": 0.1},
    "OLoRA": {"lambda_2": 0.1},
    "NLoRA": {"lambda_1": 0.01},
    "IEL": {"beta": 5.0, "fisher_dtype": torch.float64},
    "ITA": {"alpha": 5.0, "fisher_dtype": torch.float64},
    "PerturbAndMerge": {"fisher_dtype": torch.float64},
}
NAMES = ["first", "second", "third"]
WIDE = torch.float64


class Convs(nn.Module):
    """x `[N, 3, 6, 6]` -> logits `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 1)
        self.third = nn.Conv1d(6, 3, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.third(x.flatten(2)).mean(2)


class Linears(nn.Module):
    """The same with linear layers."""

    def __init__(self, convs: Convs) -> None:
        super().__init__()
        for name, conv in convs.named_children():
            linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, dtype=WIDE)
            linear.weight.data.copy_(conv.weight.flatten(1))
            linear.bias.data.copy_(conv.bias)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(F.unfold(x, 3, stride=2, padding=1).mT))
        x = torch.tanh(self.second(x))
        windows = torch.stack([x.roll(1, 1), x, x.roll(-1, 1)], dim=-1).flatten(2)
        return self.third(windows).mean(1)


def data(task: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(5, 3, 6, 6, generator=generator, dtype=WIDE)
    return x, torch.randint(3, (5,), generator=generator)


def pair() -> list[nn.Module]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    convs = Convs().to(WIDE)
    models = [convs, Linears(convs)]
    for model in models:
        torch.manual_seed(1)
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=NAMES))
    return models


def test_pair_is_equal():
    """The two models compute the same, with adapters that are not zero."""
    models = pair()
    for model in models:
        randomize_adapters_(model)
    torch.testing.assert_close(*(model(data(0)[0]) for model in models), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_convs(name):
    """Losses, trained values and the exported model, over three tasks."""
    results = []
    for model in pair():
        torch.manual_seed(0)
        method = getattr(fe.methods, name.split("-")[0])(model, **METHODS[name])
        values = []
        for task in range(3):
            method.begin_task(task)
            x, y = data(task)
            method.prepare([(x[:3], y[:3]), (x[3:], y[3:])])
            layers = fe.adapters(model).values()
            trained = [p for layer in layers for _, p in layer.named_lora_parameters() if p.requires_grad]
            for step in range(2):
                value = F.cross_entropy(model(x), y) + method.penalty()
                grads = torch.autograd.grad(value, trained, allow_unused=True)
                with torch.no_grad():
                    for p, grad in zip(trained, grads, strict=True):
                        p -= 0.1 * torch.zeros_like(p) if grad is None else 0.1 * grad
                method.after_step(step, 2)
                values += [value.detach(), *(p.detach().clone() for p in trained)]
            for p in trained:
                p.grad = torch.ones_like(p)  # for the check that something was trained
            method.end_task([(x, y)], F.cross_entropy)
        exported = method.export(1) if name == "CLLoRA" else method.export()  # the model of one task
        results.append([*values, exported(data(9)[0])])
    assert type(exported) is Linears and len(results[0]) > 10
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
