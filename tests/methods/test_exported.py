# SPDX-License-Identifier: Apache-2.0
"""A method whose model was exported refuses, in words, all that needs the adapters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, batches, data
from torch import nn

import fused_ewclora as fe
from fused_ewclora.methods import Method

METHODS: dict[str, dict[str, Any]] = {
    "CLLoRA": {"shared": ["fc"]},
    "CoDyRA": {},
    "CoDyRA-EWC": {"ewc_lambda": 5.0},
    "EWCLoRA": {"ewc_lambda": 5.0},
    "FactorEWC": {"ewc_lambda": 5.0},
    "IEL": {"beta": 1.0},
    "ITA": {"alpha": 1.0},
    "InfLoRA": {},
    "KeepLoRA": {},
    "LoRA": {},
    "NLoRA": {"lambda_1": 0.1},
    "OLoRA": {},
    "PerturbAndMerge": {},
    "SDLoRA": {},
    "SDLoRA-EWC": {"ewc_lambda": 5.0},
}
X, Y = data(8)
LOADER = batches(X, Y, 4)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "after_step": (0, 1),
    "begin_task": (1,),
    "distillation": (X, nn.Identity()),
    "end_task": (LOADER, F.cross_entropy),
    "estimate_prior": (LOADER, F.cross_entropy),
    "load_state_dict": ({},),
    "prepare": (LOADER, F.cross_entropy),
    "task": (0,),
}
# Of numbers that the method itself holds, which outlive its adapters.
STILL = ("kappa", "kept_tensors", "threshold")
REPORTS_STILL = ("KeepLoRA", "PerturbAndMerge")


def made(name: str, tasks: int = 1) -> Method:
    model = adapted()
    for layer in fe.adapters(model).values():
        for _, _, lora_b in layer.adapter_parameters():
            nn.init.zeros_(lora_b)
    method = getattr(fe.methods, name.split("-")[0])(model, **METHODS[name])
    for task in range(tasks):
        method.begin_task(task)
        method.prepare(LOADER, F.cross_entropy)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        (F.cross_entropy(model(X), Y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(0, 1)
        method.end_task(LOADER, F.cross_entropy)
    return method


def refusing(method: Method, name: str) -> list[str]:
    """The public functions of a method that need adapters."""
    found = [own for own, value in inspect.getmembers(type(method), inspect.isfunction) if own[0] != "_"]
    reports = name in REPORTS_STILL
    return [own for own in found if own not in STILL and not (reports and own == "report")]


def call(method: Method, name: str) -> None:
    result = getattr(method, name)(*ARGUMENTS.get(name, ()))
    if hasattr(result, "__enter__"):
        with result:
            pass


def test_all_methods_listed():
    kinds = {name for name in fe.methods.__all__ if name != "Method"}
    assert {name.split("-")[0] for name in METHODS} == kinds


@pytest.mark.parametrize("tasks", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_calls_after_export(name, tasks):
    """Every call that needs adapters names itself and says that they are gone; nothing changes."""
    method = made(name, tasks)
    model = method.export()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for own in refusing(method, name):
        with pytest.raises(fe.ArgumentError, match=r"exported or ejected already.*make a new") as error:
            call(method, own)
        assert str(error.value).split(":")[0] == own
    assert method.tasks == tasks and "running" not in repr(method)
    for _ in method.kept_tensors():
        pass
    if name in REPORTS_STILL:
        assert len(method.report().rows) == (0 if name == "KeepLoRA" and not tasks else 3)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", METHODS)
def test_calls_after_eject(name):
    """So does a method whose model was ejected during a task."""
    method = made(name)
    method.begin_task(1)
    method.prepare(LOADER, F.cross_entropy)
    for layer in method.layers.values():
        layer.composer = None
    fe.eject(method.model, merge=False)
    for own in refusing(method, name):
        with pytest.raises(fe.ArgumentError, match="exported or ejected already"):
            call(method, own)


def test_next_method_keeps_its_adapters():
    """A method that was exported does not touch the adapters of the next one on the same model."""
    first = made("LoRA")
    second = fe.methods.LoRA(first.export(), fe.LoRAConfig(r=2, target_modules=["fc"]))
    for own in ("begin_task", "export", "state_dict"):
        with pytest.raises(fe.ArgumentError, match="exported or ejected already"):
            call(first, own)
    second.begin_task(0)
    assert list(fe.adapters(second.model)) == ["fc"]


def test_failed_export_can_be_repeated():
    """An export that raises leaves the method as it was."""
    method = made("LoRA")
    weight = method.model.fc.weight
    value = float(weight[0, 0].detach())
    with torch.no_grad():
        weight[0, 0] = float("inf")
        method.model.fc.lora_B.fill_(1.0)
    with pytest.raises(fe.EWCLoRAError, match="finite"):
        method.export()
    with torch.no_grad():
        weight[0, 0] = value
    assert type(method.export().fc) is nn.Linear


def test_penalty_of_an_ejected_ewc():
    """The first penalty after eject names the adapter that is missing."""
    model = adapted()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task(LOADER, F.cross_entropy)
    fe.eject(model)
    with pytest.raises(fe.TargetError, match="expected the adapter that this EWC was made for"):
        ewc.penalty()
