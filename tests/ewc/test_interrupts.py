# SPDX-License-Identifier: Apache-2.0
"""Fisher passes that are interrupted, at any line, or never ended."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, batches, data, layers, snapshot
from torch import nn

import fused_ewclora
from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.state import EWCState
from fused_ewclora.layers.inject import inject

FOLDER = str(Path(fused_ewclora.__file__).parent / "ewc") + os.sep


class Interrupting:
    """Raises KeyboardInterrupt at the event `at`, from 1, of the lines and calls in the folder `ewc`."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines: list[tuple[str, int]] = []
        self.swallowed = False

    def __enter__(self) -> Interrupting:
        self.before, self.hook = sys.gettrace(), sys.unraisablehook
        sys.unraisablehook = self.swallow
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)
        sys.unraisablehook = self.hook

    def swallow(self, unraisable) -> None:
        """Python drops what is raised while it closes a generator that was left early."""
        assert unraisable.exc_type is KeyboardInterrupt
        self.swallowed = True

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event in ("call", "line"):
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def small():
    """A model with one adapted layer, a frozen part in eval mode, and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inject(model, LoRAConfig(r=1, target_modules=["0"]))
    model[2].requires_grad_(True)
    nn.init.normal_(model[0].lora_B)
    model.train()
    model[1].eval()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    F.cross_entropy(model(x), y).backward()
    return model, x, y


def own_loss(output, target):
    return F.cross_entropy(output, target)


def estimated(ewc, x, y):
    ewc.estimate_fisher([(x[:2], y[:2]), (x[2:], y[2:])], own_loss)


def by_hand(ewc, x, y):
    with ewc.accumulate_fisher():
        F.cross_entropy(ewc.model(x), y).backward()


def events_of(run, ewc, x, y):
    """The first, second and last event at every line."""
    with Interrupting(0) as interrupting:
        run(ewc, x, y)
    at: dict[tuple[str, int], list[int]] = {}
    for event, line in enumerate(interrupting.lines, 1):
        at.setdefault(line, []).append(event)
    return sorted({event for events in at.values() for event in (*events[:2], events[-1])})


@pytest.mark.parametrize("run", [estimated, by_hand])
def test_interrupt_anywhere(run):
    """An interrupt at any line leaves modes, gradients, captures and Fishers as they were, and a new pass
    works."""
    model, x, y = small()
    ewc = EWC(model, fisher_dtype=torch.float64)
    events = events_of(run, EWC(copy.deepcopy(model), fisher_dtype=torch.float64), x, y)
    assert len(events) > 50
    for at in events:
        if run is by_hand:  # its backward passes add to the gradients, as any do
            model.zero_grad()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        modes = [module.training for module in model.modules()]
        try:
            with Interrupting(at) as interrupting:
                run(ewc, x, y)
        except KeyboardInterrupt:
            assert ewc._state.task is None, at
        else:
            assert interrupting.swallowed, at
            ewc._state = EWCState()
        assert [module.training for module in model.modules()] == modes, at
        assert model[0].fisher_capture is None, at
        assert not model._forward_pre_hooks and not model._forward_hooks, at
        assert torch.is_grad_enabled() and torch.compiler.is_compiling() is False
        if run is estimated:
            assert all(p.grad is gradients[name] for name, p in model.named_parameters()), at
    run(ewc, x, y)
    expected = EWC(small()[0], fisher_dtype=torch.float64)
    run(expected, x, y)
    assert torch.equal(ewc._state.task.buffers["0"], expected._state.task.buffers["0"])


def test_interrupt_keeps_fishers():
    """Fishers of earlier passes survive an interrupt of the next one."""
    model, x, y = small()
    ewc = EWC(model, fisher_dtype=torch.float64)
    estimated(ewc, x, y)
    task = ewc._state.task
    before = task.buffers["0"].clone()
    events = events_of(estimated, EWC(copy.deepcopy(model), fisher_dtype=torch.float64), x, y)
    for at in events[-8:]:
        with pytest.raises(KeyboardInterrupt), Interrupting(at):
            estimated(ewc, x, y)
        assert ewc._state.task is task and torch.equal(task.buffers["0"], before), at


@pytest.mark.parametrize("where", ["loader", "forward", "loss", "batch_size_fn"])
def test_interrupt_of_callbacks(where):
    """An interrupt in what the user gives leaves everything as it was."""
    model, x, y = small()
    ewc = EWC(model)

    def stop(*_):
        raise KeyboardInterrupt

    def loader():
        yield x, y
        if where == "loader":
            stop()
        yield x, y

    options = {"batch_size_fn": stop} if where == "batch_size_fn" else {}
    options |= {"forward": stop} if where == "forward" else {}
    gradients = [p.grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        ewc.estimate_fisher(loader(), stop if where == "loss" else own_loss, **options)
    assert model.training and not model[1].training and model[0].fisher_capture is None
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    ewc.end_task([(x, y)], F.cross_entropy)


def test_modes_of_grad():
    """A pass inside no_grad or inference mode computes gradients and leaves the mode."""
    x, y = data(4)
    for context in (torch.no_grad(), torch.inference_mode()):
        ewc = EWC(adapted(), fisher_dtype=torch.float64)
        with context:
            ewc.estimate_fisher([(x, y)], F.cross_entropy)
            assert not torch.is_grad_enabled()
        assert ewc._state.task.samples == 4


def suspended(ewc, x, y):
    """A block that nobody ends."""
    with ewc.accumulate_fisher():
        F.cross_entropy(ewc.model(x), y).backward()
        yield


def test_abort_suspended_pass():
    """A pass that is stuck is ended from outside; what it gathered is discarded."""
    x, y = data(6)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64)
    ewc.abort_fisher()  # nothing to do
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    before = snapshot(model, ewc.state_dict()["tensors"])
    stuck = suspended(ewc, x, y)
    next(stuck)
    with pytest.raises(FisherError, match=r"another Fisher pass.*abort_fisher"):
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
    ewc.abort_fisher()
    ewc.abort_fisher()
    assert all(layer.fisher_capture is None for layer in layers(model))
    assert_same(before, snapshot(model, ewc.state_dict()["tensors"]))
    with ewc.accumulate_fisher():  # the end of the old block does not end a new one
        with pytest.raises(FisherError, match="ended by abort_fisher"):
            next(stuck)
        F.cross_entropy(model(x), y).backward()
    ewc.consolidate()
    assert ewc.history[0].samples == 12


def test_abort_of_copies():
    """A pass of the model is ended by a copy of the controller neither when it is copied nor when it ends."""
    x, y = data(4)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher():
        for copied in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
            copied.abort_fisher()
            copied.estimate_fisher([(x, y)], F.cross_entropy)
        F.cross_entropy(model(x), y).backward()
    ewc.consolidate()


def test_empty_share():
    """A loader without samples adds zero where that is asked for, and a task of nothing is not ended."""
    x, y = data(6)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64)
    for loader in ([], [(x[:0], y[:0])]):
        with pytest.raises(FisherError, match="loader is empty"):
            ewc.estimate_fisher(loader, F.cross_entropy)
        ewc.estimate_fisher(loader, F.cross_entropy, allow_empty=True)
    with ewc.accumulate_fisher(allow_empty=True):
        pass
    other = EWC(adapted(), fisher_dtype=torch.float64)
    other.load_state_dict(ewc.state_dict())
    for empty in (ewc, other):
        with pytest.raises(FisherError, match="no samples"):
            empty.consolidate()
        empty.estimate_fisher(batches(x, y, 4), F.cross_entropy, allow_empty=True)
        empty.consolidate()
    expected = EWC(adapted(), fisher_dtype=torch.float64)
    expected.end_task(batches(x, y, 4), F.cross_entropy)
    assert ewc.history == expected.history
    for key, fisher in expected.fishers.items():
        assert torch.equal(ewc.fishers[key], fisher)
