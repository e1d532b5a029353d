# SPDX-License-Identifier: Apache-2.0
"""What InfLoRA refuses before it changes anything, and its state between runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, batches, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import InfLoRA

BAD = [
    {"epsilon": 1.1}, {"epsilon": -0.1}, {"epsilon_last": float("nan")}, {"total_tasks": 0},
    {"total_tasks": 2.5}, {"variant": "mine"}, {"max_batches": 0},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_values_refused(options):
    """Bad values are refused before anything is changed."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fe.ArgumentError, match=next(iter(options))):
        InfLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), **options)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_trained_b_refused():
    """Preparing another A beside a trained B is refused."""
    method = InfLoRA(adapted())
    method.begin_task(0)
    before = snapshot(method.model)
    with pytest.raises(fe.ArgumentError, match="lora_B of 0"):
        method.prepare([data(4)])
    assert_same(before, snapshot(method.model))


def test_missing_prepare():
    """A task without `prepare` is refused at once."""
    model = fresh()
    method = InfLoRA(model)
    with pytest.raises(fe.ArgumentError, match="begin_task first"):
        method.prepare(batches(*data(4), 2))
    for task in range(2):
        method.begin_task(task)
        before = snapshot(model)
        for call in (
            method.penalty,
            lambda method=method: method.after_step(0, 2),
            lambda method=method: method.end_task(batches(*data(4), 2)),
        ):
            with pytest.raises(fe.ArgumentError, match="prepare"):
                call()
        assert_same(before, snapshot(model))
        method.prepare(batches(*data(4), 2))
        assert method.penalty().item() == 0.0
        method.end_task(batches(*data(4), 2))


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.skipped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.skipped.weight)


FAILURES = [
    (case, name)
    for name in ("prepare", "end_task")
    for case in ("empty", "exhausted", "nan", "merged", "bypassed")
]


@pytest.mark.parametrize(("case", "pass_"), [*FAILURES, ("weight", "end_task")])
def test_failed_pass_unchanged(case, pass_):
    """Passes that fail change nothing."""
    model = Bypassing() if case == "bypassed" else nn.Sequential(nn.Linear(4, 4))
    method = InfLoRA(model, fe.LoRAConfig(r=2, target_modules="all-linear"), epsilon=0.5)
    method.begin_task(0)
    x = torch.randn(5, 4)
    loader, error = [x], fe.ArgumentError
    if pass_ == "end_task":
        if case == "bypassed":
            method._prepared = True  # which prepare would have refused
        else:
            method.prepare([x])
            with torch.no_grad():
                model[0].lora_B.normal_()
    if case == "empty":
        loader = []
    elif case == "exhausted":
        loader = iter([x])
        list(loader)
    elif case == "nan":
        loader = [x, x * torch.nan]
    elif case == "merged":
        fe.merge(model)
        error = fe.TargetError
    elif case == "bypassed":
        error = fe.TargetError
    else:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.inf
    before, subspaces = snapshot(model), dict(method.subspaces)
    with pytest.raises(error):
        getattr(method, pass_)(loader)
    assert_same(before, snapshot(model))
    assert method.subspaces == subspaces and method.tasks == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def whole(method: InfLoRA) -> dict[str, Tensor]:
    return snapshot(method.model, {name: used.basis for name, used in method.subspaces.items()})


def task(method: InfLoRA) -> None:
    number = method.tasks
    x, y = data(8, seed=number)
    method.begin_task(number)
    method.prepare(batches(x, y, 4))
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(method.model(x), y).backward()
        optimizer.step()
    method.end_task(batches(x, y, 4))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_resume_fresh_model(after, tmp_path):
    """A saved state goes on in a fresh model."""
    options = {"epsilon": 0.6, "total_tasks": 5}
    method = InfLoRA(fresh(), **options)
    for _ in range(after):
        task(method)
    torch.save([method.model.state_dict(), method.state_dict()], tmp_path / "state.pt")
    model_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = InfLoRA(fresh(seed=8), **options)
    other.model.load_state_dict(model_state)
    other.load_state_dict(state)
    assert other.tasks == after == other.model.fc.consolidated_tasks
    task(method)
    task(other)
    assert_same(whole(method), whole(other))
    assert type(other.export().fc) is nn.Linear


def test_bad_state_refused():
    """States that do not fit are refused."""
    wide = {"epsilon": 0.5}  # so that no subspace is empty, whatever the numbers
    method = InfLoRA(fresh(), **wide)
    method.begin_task(0)
    with pytest.raises(fe.ArgumentError, match="has not ended"):
        method.state_dict()
    method.prepare([data(4)])
    method.end_task([data(4)])
    state = method.state_dict()
    other = InfLoRA(fresh(), **wide)
    basis = state["tensors"]["subspace.fc"]
    assert basis.shape[1] > 0
    wrong = [
        ({**state, "config": {**state["config"], "variant": "official"}}, "variant"),
        ({**state, "config": {**state["config"], "complements": {"qkv": False}}}, "complements"),
        ({**state, "tensors": {"subspace.qkv": basis}}, "subspace of fc"),
        ({**state, "tensors": {**state["tensors"], "subspace.fc": basis.float()}}, "fp64"),
        ({**state, "tensors": {**state["tensors"], "subspace.fc": basis[1:]}}, "expected .6"),
        ({**state, "tensors": {**state["tensors"], "subspace.fc": 2 * basis}}, "orthonormal"),
    ]
    for saved, message in wrong:
        with pytest.raises(fe.CheckpointError, match=message):
            other.load_state_dict(saved)
        assert other.tasks == 0 and all(used.rank == 0 for used in other.subspaces.values())
