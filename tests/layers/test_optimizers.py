# SPDX-License-Identifier: Apache-2.0
"""Optimizers over task boundaries: the state of adapters is dropped, all other state is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, controller, data, layers, snapshot
from torch import nn

import fused_ewclora as fe
from fused_ewclora.errors import ArgumentError, TargetError

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "foreach": False}),
    "SGD momentum foreach": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "foreach": True}),
    "SGD momentum fused": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}),
    "Adam": (Adam, {"lr": 0.1, "foreach": False}),
    "Adam foreach": (Adam, {"lr": 0.1, "foreach": True, "amsgrad": True}),
    "Adam fused": (Adam, {"lr": 0.1, "fused": True}),
    "AdamW": (AdamW, {"lr": 0.1, "foreach": False}),
    "AdamW foreach": (AdamW, {"lr": 0.1, "foreach": True}),
    "AdamW fused": (AdamW, {"lr": 0.1, "fused": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.25}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.1}),
}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in layers(model) for _, p in layer.named_lora_parameters()]


def heads(model: nn.Module) -> list[nn.Parameter]:
    return list(model.head.parameters())


def steps(model, ewc, optimizers, seed: int, count: int = 3) -> None:
    for step in range(count):
        x, y = data(8, seed=10 * seed + step)
        model.zero_grad()
        (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()


def task_end(model, ewc) -> None:
    torch.manual_seed(7)
    ewc.end_task([data(6)], F.cross_entropy)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_adapter_moments(name):
    """Bitwise that of two optimizers, of which the adapters' is made anew and the head's is kept."""
    kind, options = OPTIMIZERS[name]
    model = adapted()
    twin = copy.deepcopy(model)
    ewc, twin_ewc = controller(model), controller(twin)
    optimizer = kind([{"params": lora_parameters(model)}, {"params": heads(model)}], **options)
    kept, made_anew = kind(heads(twin), **options), kind(lora_parameters(twin), **options)
    steps(model, ewc, [optimizer], 1)
    steps(twin, twin_ewc, [made_anew, kept], 1)
    for both in ((model, ewc), (twin, twin_ewc)):
        task_end(*both)
    assert fe.reset_optimizer_state_(optimizer, model) == len(lora_parameters(model))
    made_anew = kind(lora_parameters(twin), **options)
    steps(model, ewc, [optimizer], 2)
    steps(twin, twin_ewc, [made_anew, kept], 2)
    assert_same(snapshot(model), snapshot(twin))


def test_stale_moments_move():
    """What the reset is for: a gradient of zero must not move the adapters of a new task."""
    moved = {}
    for reset in (False, True):
        model = adapted()
        ewc = controller(model)
        optimizer = torch.optim.Adam(lora_parameters(model), lr=0.1)
        steps(model, ewc, [optimizer], 1)
        task_end(model, ewc)
        if reset:
            fe.reset_optimizer_state_(optimizer, model)
        before = snapshot(model)
        for parameter in lora_parameters(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[reset] = any(not torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert moved == {False: True, True: False}


def test_lbfgs_history_cleared():
    """L-BFGS forgets all of its history."""
    model = adapted()
    x, y = data(8)

    def step(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    optimizer = torch.optim.LBFGS(heads(model) + lora_parameters(model), max_iter=2)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    fe.reset_optimizer_state_(optimizer, model)
    step(model, optimizer)
    step(twin, torch.optim.LBFGS(heads(twin) + lora_parameters(twin), max_iter=2))
    assert_same(snapshot(model), snapshot(twin))


def test_scales_and_wrappers():
    """Learned scales and the parameters of wrapped models are found."""
    model = adapted()
    model.fc.lora_scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
    wrapped = nn.Sequential(model)
    optimizer = torch.optim.Adam(wrapped.parameters())
    ewc = controller(wrapped)
    steps(model, ewc, [optimizer], 1)
    fe.reset_optimizer_state_(optimizer, wrapped)
    assert set(optimizer.state) == set(heads(model))


def test_schedules_and_hyperparameters_stay():
    model = adapted()
    optimizer = torch.optim.SGD(lora_parameters(model) + heads(model), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(model, controller(model), [optimizer], 1)
    schedule.step()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    fe.reset_optimizer_state_(optimizer, model)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("case", ["no adapters", "made before inject", "parameters replaced"])
def test_meaningless_reset_refused(case):
    """A reset that makes no sense is refused and changes nothing."""
    model = adapted()
    optimizer = torch.optim.Adam(heads(model) if case == "made before inject" else model.parameters())
    steps(model, controller(model), [optimizer], 1)
    before = copy.deepcopy(optimizer.state_dict())
    other = nn.Linear(2, 2) if case == "no adapters" else model
    if case == "parameters replaced":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    error, message = (
        (TargetError, "model: expected adapters")
        if case == "no adapters"
        else (ArgumentError, "optimizer: .*make a new one")
    )
    with pytest.raises(error, match=message):
        fe.reset_optimizer_state_(optimizer, other)
    assert str(before) == str(optimizer.state_dict())
