# SPDX-License-Identifier: Apache-2.0
"""The protocol of the methods, and those that are EWC and nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, batches, data, snapshot
from torch import nn

import fused_ewclora as fe
from fused_ewclora.methods import LoRA, Method


def run(method: Method, tasks: int = 2, steps: int = 2) -> nn.Module:
    for task in range(tasks):
        method.begin_task(task)
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.05)
        x, y = data(8, seed=task)
        for step in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, steps)
        method.end_task(batches(x, y, 4), F.cross_entropy)
    return method.model


def test_ewc_lora_manual():
    """EWC-LoRA is EWC used by hand."""
    method = fe.methods.EWCLoRA(adapted(), ewc_lambda=5.0, generator=torch.Generator().manual_seed(1))
    run(method)
    model = adapted()
    ewc = fe.EWC(model, ewc_lambda=5.0, generator=torch.Generator().manual_seed(1))
    for task in range(2):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x, y = data(8, seed=task)
        for _ in range(2):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
            optimizer.step()
        ewc.end_task(batches(x, y, 4), F.cross_entropy)
    for (name, found), expected in zip(method.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_sequential_lora():
    """Sequential LoRA folds the adapters in and starts anew."""
    model = adapted()
    expected = {name: layer.consolidated_weight() for name, layer in fe.adapters(model).items()}
    method = LoRA(model)
    method.begin_task(0)
    x = data(4)[0]
    before = model(x)
    method.end_task([])
    for name, layer in fe.adapters(model).items():
        assert torch.equal(layer.weight, expected[name]) and layer.consolidated_tasks == 1
        assert all(not b.any() and a.any() for _, a, b in layer.adapter_parameters())
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert type(method.export().fc) is nn.Linear
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_failed_task_unchanged():
    """A task that cannot end changes nothing."""
    model = adapted()
    method = LoRA(model)
    method.begin_task(0)
    model.fc.lora_A.data = model.fc.lora_A.data[:, :-1]  # does not fit
    before = snapshot(model)
    with pytest.raises(fe.EWCLoRAError):
        method.end_task([])
    assert method.tasks == 0 and all(torch.equal(v, before[k]) for k, v in snapshot(model).items())


def test_plain_model_injected():
    """A plain model is injected."""
    config = fe.LoRAConfig(r=2, target_modules=["0"])
    method = LoRA(nn.Sequential(nn.Linear(4, 4)), config)
    assert list(method.layers) == ["0"]
    with pytest.raises(fe.ArgumentError, match="config"):
        LoRA(nn.Sequential(nn.Linear(4, 4)))


REFUSED = {
    "CoDyRA": {"ewc_lambda": 1.0, "fisher": "dense", "fisher_dtype": torch.int8},
    "EWCLoRA": {"ewc_lambda": 1.0, "gamma": 2.0},
    "IEL": {"beta": 1.0, "fisher_dtype": torch.int8},
    "KeepLoRA": {"epsilon_w": {"other": 0.5}},
    "CLLoRA": {"shared": "other"},
    "PerturbAndMerge": {"fisher_dtype": torch.int8},
    "SDLoRA": {"ewc_lambda": 1.0, "gamma": 2.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_leave_model(name: str):
    """A plain model stays plain, and what trained trains, when the options are refused."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fe.EWCLoRAError):
        getattr(fe.methods, name)(model, fe.LoRAConfig(r=2, target_modules=["0"]), **REFUSED[name])
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    injected = adapted()
    with pytest.raises(fe.EWCLoRAError):
        getattr(fe.methods, name)(injected, **REFUSED[name])
    assert len(fe.adapters(injected)) == 2


def test_tasks_come_in_order():
    method = LoRA(adapted())
    with pytest.raises(fe.ArgumentError, match="begin_task first"):
        method.end_task([])
    with pytest.raises(fe.ArgumentError, match="expected 0"):
        method.begin_task(1)
    method.begin_task(0)
    with pytest.raises(fe.ArgumentError, match="has not ended"):
        method.begin_task(1)
    with pytest.raises(fe.ArgumentError, match="has not ended"):
        method.export()
    with pytest.raises(fe.ArgumentError, match="total_steps"):
        method.after_step(3, 3)
    assert method.penalty().item() == 0.0


@pytest.mark.parametrize("kind", [fe.methods.LoRA, fe.methods.EWCLoRA])
def test_resume_state(kind: type[Method]) -> None:
    """A state goes on from where it was saved."""
    options = {"ewc_lambda": 5.0} if kind is fe.methods.EWCLoRA else {}
    torch.manual_seed(0)
    whole = kind(adapted(), **options)
    run(whole, 1)
    saved, rng = whole.state_dict(), torch.get_rng_state()
    model_state = {name: value.clone() for name, value in whole.model.state_dict().items()}
    saved = {"tensors": {k: v.clone() for k, v in saved["tensors"].items()}, "config": saved["config"]}
    resumed = kind(adapted(), **options)
    resumed.load_state_dict(saved)
    resumed.model.load_state_dict(model_state)
    for method in (whole, resumed):
        torch.set_rng_state(rng)
        method.begin_task(1)
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.05)
        x, y = data(8, seed=7)
        for _ in range(2):
            optimizer.zero_grad()
            (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
            optimizer.step()
        method.end_task(batches(x, y, 4), F.cross_entropy)
    for (name, found), expected in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert {k: v.consolidated_tasks for k, v in resumed.layers.items()} == dict.fromkeys(resumed.layers, 2)


def test_other_method_refused() -> None:
    """The state of another method is refused."""
    with pytest.raises(fe.CheckpointError, match="method"):
        LoRA(adapted()).load_state_dict(fe.methods.EWCLoRA(adapted(), ewc_lambda=1.0).state_dict())
    broken = fe.methods.EWCLoRA(adapted(), ewc_lambda=1.0).state_dict()
    broken["config"].pop("ewc")
    with pytest.raises(fe.FisherError, match="state"):
        fe.methods.EWCLoRA(adapted(), ewc_lambda=1.0).load_state_dict(broken)
