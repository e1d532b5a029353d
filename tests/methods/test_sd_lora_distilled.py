# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA-KD: where a direction of a later task can lie in the span of earlier ones, and where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import SDLoRA

D, R = 64, 10
THRESHOLD = 9e-4  # the paper's


def model_of(d_in: int, d_out: int, rank: int, **options) -> SDLoRA:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    config = fe.LoRAConfig(r=rank, target_modules=["0"])
    return SDLoRA(model, config, kd_threshold=THRESHOLD, **options)


def learn(method: SDLoRA, task: int, x: Tensor, y: Tensor, lora_a: Tensor | None = None) -> None:
    """One step of gradient descent."""
    method.begin_task(task)
    layer = method.model[0]
    if lora_a is not None:
        with torch.no_grad():
            layer.lora_A.copy_(lora_a)
    (method.model(x) - y).square().mean().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    method.end_task([])


@pytest.mark.parametrize("magnitudes", ["per_adapter", "shared"])
@pytest.mark.parametrize("same", [True, False])
def test_repeated_task(magnitudes, same):
    """A repeated task is dropped if it starts from the same A; from another one it is nearly orthogonal."""
    method = model_of(D, 1, R, magnitudes=magnitudes)
    x, y = torch.randn(1, D).double(), torch.full((1, 1), 9.0).double()
    a = [torch.rand(R, D).double() - 0.5 for _ in range(2)]
    a = [a[0], a[0]] if same else a
    before = []
    for task, lora_a in enumerate(a):
        learn(method, task, x, y, lora_a)
        before.append(method.model(x).detach())
    # After a step from B = 0, B A is a multiple of (A x)^T A.
    first, second = (((x @ m.T) @ m).flatten() for m in a)
    cosine = first @ second / (first.norm() * second.norm())
    (row,) = method.report().rows
    torch.testing.assert_close(row["residuals"][1], 1 - float(cosine) ** 2, rtol=1e-9, atol=1e-12)
    assert row["tasks"] == ((0,) if same else (0, 1))
    assert same or row["residuals"][1] > 0.8  # the cosine is about R / D
    method.begin_task(2)
    torch.testing.assert_close(method.model(x).detach(), before[1], rtol=1e-9, atol=1e-9)


def test_full_space():
    """Once directions span all matrices of a layer, all later ones are dropped, and nothing is lost."""
    method = model_of(2, 2, 2)
    for task in range(7):
        x, y = torch.randn(2, 4, 2).double()
        method.begin_task(task)
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (method.model(x) - y).square().mean().backward()
            optimizer.step()
        expected = method.model(x)
        method.end_task([])
        torch.testing.assert_close(method.model(x), expected, rtol=1e-9, atol=1e-9)
    (row,) = method.report().rows
    assert row["tasks"] == (0, 1, 2, 3)
    assert max(row["residuals"][4:]) < 1e-9 < THRESHOLD < min(row["residuals"][:4])
