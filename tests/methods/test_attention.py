# SPDX-License-Identifier: Apache-2.0
"""The methods on an attention to a memory, whose calls apply some of its adapters each, equal themselves on
linear layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe

D, HEADS, CLASSES = 8, 2, 3
METHODS = {
    "EWCLoRA": {"ewc_lambda": 5.0},
    "FactorEWC": {"ewc_lambda": 5.0},
    "SDLoRA": {},
    "CoDyRA": {"ewc_lambda": 5.0},
    "InfLoRA": {"total_tasks": 3},
    "KeepLoRA": {"epsilon_w": 0.3, "epsilon_f": 0.6},
    "OLoRA": {"lambda_2": 0.1},
    "NLoRA": {"lambda_1": 0.01},
    "IEL": {"beta": 5.0},
    "PerturbAndMerge": {},
}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(D, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        memory = x[:, :3].sin()
        return self.head(self.attn(x, memory, memory, need_weights=False)[0].mean(1))


class Linears(Attending):
    def __init__(self) -> None:
        super().__init__()
        attn = self.attn
        self.q, self.kv = (nn.Linear(D, n * D, dtype=torch.float64) for n in (1, 2))
        with torch.no_grad():
            self.q.weight.copy_(attn.in_proj_weight[:D])
            self.kv.weight.copy_(attn.in_proj_weight[D:])
            self.q.bias.zero_()
            self.kv.bias.zero_()
        self.out = attn.out_proj
        del self.attn

    def forward(self, x: Tensor) -> Tensor:
        made = (self.q(x), *self.kv(x[:, :3].sin()).chunk(2, -1))
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in made)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.linear(y, self.out.weight, self.out.bias).mean(1))


def run(model: nn.Module, config: fe.LoRAConfig, name: str) -> list[Tensor]:
    """Losses and trained values over three tasks, and outputs of the exported model."""
    torch.manual_seed(0)
    fe.inject(model, config)
    method = getattr(fe.methods, name)(model, **METHODS[name])
    values = []
    generator = torch.Generator().manual_seed(1)
    for task in range(3):
        x = torch.randn(6, 4, D, dtype=torch.float64, generator=generator)
        y = torch.randint(CLASSES, (6,), generator=generator)
        method.begin_task(task)
        method.prepare([(x, y)])
        layers = fe.adapters(model).values()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        for step in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + method.penalty()
            loss.backward()
            optimizer.step()
            method.after_step(step, 2)
            values += [
                loss.detach(),
                *(p.detach().clone() for layer in layers for p in layer.parameters() if p.requires_grad),
            ]
        method.end_task([(x, y)], F.cross_entropy)
    return [*values, method.export()(x).detach()]


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_attention(name: str):
    """Losses, trained values and the exported model, over three tasks."""
    layout = fe.QKVLayout(("k", "v"))
    found = run(Attending(), fe.LoRAConfig(r=2, target_modules=["attn"], slices=("k", "v")), name)
    expected = run(
        Linears(), fe.LoRAConfig(r=2, target_modules=["kv"], slices=("k", "v"), layout=layout), name
    )
    assert len(found) == len(expected) > 6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
