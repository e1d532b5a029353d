# SPDX-License-Identifier: Apache-2.0
"""EWC of other libraries on the adapters of a run, against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from benchmarks.continual.peers import OnlineEWC
from benchmarks.continual.stream import Arrays, loader

LAMBDA, GAMMA = 3.0, 0.9


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(task: int) -> Arrays:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return Arrays(x, torch.randint(3, (7,), generator=generator))


def literal(model: nn.Module, names: list[str], examples: Arrays) -> dict[str, Tensor]:
    """The mean over examples of p(label) (d log p(label))^2."""
    table = dict(model.named_parameters())
    sums = {name: torch.zeros_like(table[name]) for name in names}
    for x, y in zip(examples.inputs, examples.labels, strict=True):
        log_p = F.log_softmax(model(x), 0)[y]
        gradients = torch.autograd.grad(log_p, [table[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += log_p.exp().detach() * gradient**2
    return {name: value / len(examples) for name, value in sums.items()}


def test_online_ewc_formulas() -> None:
    """Importances, anchors and the penalty are those of the formulas, over three tasks and a resumption."""
    model = made()
    method = OnlineEWC(model, fe.LoRAConfig(r=2, target_modules=["0", "2"]), ewc_lambda=LAMBDA, gamma=GAMMA)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected: dict[str, Tensor] = {}
    anchor: dict[str, Tensor] = {}
    for task in range(3):
        method.begin_task(task)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.add_(0.3 * torch.randn_like(p))
        table = dict(model.named_parameters())
        total = (
            sum((expected[n] * (table[n] - anchor[n]) ** 2).sum() for n in expected)
            if expected
            else torch.zeros((), dtype=torch.float64)
        )
        wanted = LAMBDA * torch.as_tensor(total).item()
        assert method.penalty().item() == pytest.approx(wanted, rel=1e-12)
        fresh = literal(model, names, data(task))
        method.end_task(loader(data(task), 3, torch.Generator().manual_seed(1)), F.cross_entropy)
        for name in names:
            expected[name] = GAMMA * expected.get(name, torch.zeros_like(fresh[name])) + fresh[name]
            anchor[name] = table[name].detach().clone()
        again: Any = made()
        resumed = OnlineEWC(
            again, fe.LoRAConfig(r=2, target_modules=["0", "2"]), ewc_lambda=LAMBDA, gamma=GAMMA
        )
        resumed.load_state_dict(copy.deepcopy(method.state_dict()))
        again.load_state_dict(model.state_dict())
        for name in names:
            torch.testing.assert_close(resumed.importance[name], expected[name], rtol=1e-10, atol=1e-14)
        method = method if task == 1 else resumed
        model = method.model  # type: ignore[assignment]
