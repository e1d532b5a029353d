# SPDX-License-Identifier: Apache-2.0
"""EWC of the installed avalanche-lib on the adapters of a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from benchmarks.continual.peers import AvalancheEWC
from benchmarks.continual.stream import Arrays, loader


class Pair(nn.Module):
    """Takes inputs of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, shift = inputs
        return self.down(torch.tanh(self.up(x + shift)))


def test_importances_and_penalty() -> None:
    """Squared gradients of batch means, averaged over batches and added up; no factor 1/2."""
    torch.manual_seed(0)
    model = Pair().double()
    config = fe.LoRAConfig(r=2, target_modules=["up", "down"])
    method = AvalancheEWC(model, config, ewc_lambda=2.0, decay_factor=0.5, batch_size=4)
    x = torch.randn(10, 6, dtype=torch.float64)
    data = Arrays((x, torch.ones_like(x)), torch.randint(3, (10,)))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = {name: torch.zeros_like(dict(model.named_parameters())[name]) for name in names}
    for task in range(2):
        method.begin_task(task)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.add_(0.3 * torch.randn_like(p))
        for name in names:
            expected[name] = 0.5 * expected[name] if task else expected[name]
        for index in order.split(4):
            inputs, labels = data[index.tolist()]
            loss = F.cross_entropy(model(inputs), labels)  # type: ignore[arg-type]
            table = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, [table[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                expected[name] += gradient**2 / 3
        method.end_task(loader(data, 4), F.cross_entropy)
        for name in names:
            found = method.importance[name].double()  # avalanche adds them up in fp32
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-9)
        assert all(p.grad is None for p in model.parameters())
        assert float(method.penalty()) == 0.0
    table = dict(model.named_parameters())
    for name in names:
        table[name].data.add_(0.1)
    wanted = 2.0 * sum((0.01 * value).sum() for value in expected.values())
    assert method.penalty().item() == pytest.approx(float(wanted), rel=1e-5)
