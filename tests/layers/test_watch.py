# SPDX-License-Identifier: Apache-2.0
"""Optimizers that cannot train the adapters, or keep the moments of the last task, are told once."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import data, fresh
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

import fused_ewclora as fe

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"lr": 1e-3}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 1e-3, "max_iter": 2}),
}
BATCH = data(6)


@pytest.fixture(autouse=True)
def no_hook_left() -> Iterator[None]:
    """Every test begins without waiting watches of others."""
    from fused_ewclora.layers import watch

    watch._waiting.clear()
    watch._remove_hook()
    yield


def learned(model: nn.Module, name: str = "Adam") -> torch.optim.Optimizer:
    kind, options = OPTIMIZERS[name]
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(BATCH[0]), BATCH[1])
        loss.backward()
        return loss

    optimizer.step(closure)


def end(ewc: fe.EWC) -> None:
    ewc.end_task([BATCH], F.cross_entropy)


def told(action: Any) -> list[str]:
    """The warnings of ours while `action` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(entry.filename == __file__ for entry in caught if entry.category is fe.EWCLoRAWarning)
    return [str(entry.message) for entry in caught if issubclass(entry.category, fe.EWCLoRAWarning)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_moments(name: str):
    """Moments of the last task are told once, at the first step, and the hook is gone."""
    model = fresh()
    ewc = fe.EWC(model)
    optimizer = learned(model, name)
    hooks = len(_global_optimizer_pre_hooks)
    end(ewc)
    (message,) = told(lambda: step(model, optimizer))
    assert "reset_optimizer_state_(optimizer, model)" in message
    assert len(_global_optimizer_pre_hooks) == hooks
    end(ewc)
    assert told(lambda: step(model, optimizer)) == []
    assert len(_global_optimizer_pre_hooks) == hooks


@pytest.mark.parametrize("name", [*OPTIMIZERS, "plain SGD"])
def test_clean_optimizers(name: str, monkeypatch: pytest.MonkeyPatch):
    """Optimizers that were reset or are new, and those without moments, are silent."""
    monkeypatch.setitem(OPTIMIZERS, "plain SGD", (torch.optim.SGD, {"lr": 0.1}))
    model = fresh()
    ewc = fe.EWC(model)
    optimizer = learned(model, name)
    end(ewc)
    if name != "plain SGD":
        fe.reset_optimizer_state_(optimizer, model)
    assert told(lambda: step(model, optimizer)) == []
    end(ewc)
    assert told(lambda: learned(model, name)) == []


def test_other_optimizers():
    """Optimizers of a head or of another model decide nothing, and are looked at a few times only."""
    model = fresh()
    ewc = fe.EWC(model)
    optimizer, head = learned(model), torch.optim.Adam(model.head.parameters())
    end(ewc)
    assert told(lambda: step(model, head)) == []
    assert len(told(lambda: step(model, optimizer))) == 1
    end(ewc)
    hooks = len(_global_optimizer_pre_hooks)
    other = nn.Parameter(torch.zeros(1))
    unrelated = torch.optim.SGD([other], lr=0.1)
    for _ in range(100):
        unrelated.step()
    assert len(_global_optimizer_pre_hooks) == hooks - 1


def test_hook_among_others():
    """Another hook that was registered later is called on, and ours goes at the next step."""
    model = fresh()
    ewc = fe.EWC(model)
    optimizer = learned(model)
    end(ewc)
    calls: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        assert len(told(lambda: step(model, optimizer))) == 1
        step(model, optimizer)
        assert len(calls) == 2
    finally:
        handle.remove()
    step(model, optimizer)
    assert not _global_optimizer_pre_hooks


def test_optimizer_before_inject():
    """An optimizer of the base weights is told when the task ends, and at a step of a later task."""
    model = fresh()
    fe.eject(model, merge=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc"]))
    model.head.requires_grad_(True)
    ewc = fe.EWC(model)
    step(model, optimizer)
    messages = told(lambda: (ewc.estimate_fisher([BATCH], F.cross_entropy), ewc.consolidate()))
    assert len(messages) == 1 and "no adapter changed during this task" in messages[0]
    messages = told(lambda: step(model, optimizer))
    assert len(messages) == 1 and "made before inject" in messages[0]


def test_untrained_silent():
    """A Fisher without any training, in one pass or in several by hand, is not a mistake."""
    model = fresh()
    ewc = fe.EWC(model)

    def by_hand() -> None:
        for _ in range(2):
            with ewc.accumulate_fisher():
                F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        ewc.consolidate()

    assert told(lambda: ewc.end_task([BATCH], F.cross_entropy)) == []
    assert told(by_hand) == []


def test_lives_with_ewc():
    """The hook keeps neither EWC nor model alive, and copies and pickles of an EWC work while it waits."""
    gc.freeze()  # a collection then looks at what this test makes alone
    model = fresh()
    ewc = fe.EWC(model)
    end(ewc)
    for twin in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert twin.watch is not ewc.watch
        optimizer = learned(twin.model)
        end(twin)
        assert len(told(functools.partial(step, twin.model, optimizer))) == 1
    alive = weakref.ref(model)
    del model, ewc
    gc.collect()
    gc.unfreeze()
    assert alive() is None


@pytest.mark.parametrize("method", [fe.methods.LoRA, fe.methods.EWCLoRA])
def test_methods(method: type[fe.methods.LoRA]):
    """Methods tell the same."""
    running = method(fresh())
    optimizer = learned(running.model)
    running.begin_task(0)
    running.end_task([BATCH], F.cross_entropy)
    running.begin_task(1)
    assert len(told(lambda: step(running.model, optimizer))) == 1
    for parameter in (p for p in running.model.parameters() if p.requires_grad):
        parameter.grad = None
    frozen = torch.optim.Adam([p for p in running.model.parameters() if p.requires_grad], lr=0.0)
    running.tasks = 1
    for layer in fe.adapters(running.model).values():
        layer.reset_adapters()
    step(running.model, frozen)
    with pytest.warns(fe.EWCLoRAWarning, match="no adapter changed"):
        running.end_task([BATCH], F.cross_entropy)


def test_ejected_meanwhile():
    """A model that is ejected after its last task trains on as a plain model."""
    model = fresh()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([BATCH], F.cross_entropy)
    fe.eject(model)
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, torch.optim.SGD(model.parameters(), 0.1))


def test_gradients_of_last_task():
    """Gradients that were left over when the last task ended are none of the next task."""
    model = fresh()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    learned(model)
    ewc.end_task([BATCH], F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.end_task([BATCH], F.cross_entropy)
    model(BATCH[0]).sum().backward()
    with pytest.warns(fe.EWCLoRAWarning, match="no adapter changed"):
        ewc.end_task([BATCH], F.cross_entropy)


def test_task_ended_twice():
    """A second `end_task` with the loader of the last one is told once; not after training, with other data,
    or by a copy."""
    model = fresh()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), batch_size=6)

    def again(ewc: fe.EWC, data: Any = loader) -> list[str]:
        return told(lambda: ewc.end_task(data, F.cross_entropy))

    for _ in range(2):
        learned(model)
        assert again(ewc) == []
    assert again(pickle.loads(pickle.dumps(ewc))) == [] and again(ewc, [BATCH]) == []
    learned(model)
    assert again(ewc) == []
    (message,) = again(ewc)
    assert "call end_task once" in message and again(ewc) == []
