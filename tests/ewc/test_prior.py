# SPDX-License-Identifier: Apache-2.0
"""A Fisher of the pretrained weights before the first task, and one that stays all there is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, batches, controller, data, fresh, squares, train, whole
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.methods import EWCLoRA

SAMPLES = 7


def fisher_of(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """The mean of squared gradients of single samples, by plain autograd."""
    x, y = data(SAMPLES, seed=seed)
    losses = [lambda net, n=n: F.cross_entropy(net(x[n : n + 1]), y[n : n + 1]) for n in range(SAMPLES)]
    return squares(model, losses, [1 / SAMPLES] * SAMPLES)


def loader(seed: int) -> list[tuple[Tensor, Tensor]]:
    return batches(*data(SAMPLES, seed=seed), 3)


def with_prior(**options: Any) -> tuple[torch.nn.Module, fe.EWC]:
    model = fresh()
    ewc = controller(model, **options)
    ewc.estimate_fisher(loader(90), F.cross_entropy)
    ewc.consolidate_prior()
    return model, ewc


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-10 * tensor.norm(), key


def test_first_task_penalised():
    """The prior is the Fisher of the pretrained weights; nothing else changes."""
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    expected = fisher_of(model, 90)
    ewc = controller(model)
    ewc.estimate_fisher(loader(90), F.cross_entropy)
    ewc.consolidate_prior()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    close(ewc.fishers, expected)
    assert ewc.tasks == 0 and ewc.history[0].prior and ewc.history[0].samples == SAMPLES
    assert ewc.penalty().item() == 0.0  # B = 0
    train(model, ewc, 0)
    deltas = {"fc": model.fc.consolidated_weight() - model.fc.weight}
    rows = (model.qkv.consolidated_weight() - model.qkv.weight).split(6)
    deltas |= {"qkv.k": rows[1], "qkv.v": rows[2]}
    literal = sum((expected[key] * delta.square()).sum() for key, delta in deltas.items())
    torch.testing.assert_close(ewc.penalty(), 10.0 * literal, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("options", "weights"), [
    ({}, (1.0, 1.0)), ({"gamma": 0.5}, (0.5, 1.0)), ({"gamma": 0.25, "update": "convex"}, (0.25, 0.75)),
    ({"update": "fixed"}, (1.0, 0.0)), ({"merge_mode": "factors"}, (1.0, 1.0)),
])  # fmt: skip
def test_task_joins(options: dict[str, Any], weights: tuple[float, float]):
    """The first task joins the prior as it would join an earlier task; a fixed one stays bit for bit."""
    model, ewc = with_prior(**options)
    prior = {key: f.clone() for key, f in ewc.fishers.items()}
    train(model, ewc, 0)
    task = fisher_of(model, 50)
    ewc.end_task(loader(50), F.cross_entropy)
    close(ewc.fishers, {key: weights[0] * f + weights[1] * task[key] for key, f in prior.items()})
    assert ewc.tasks == 1 and [record.prior for record in ewc.history] == [True, False]
    if weights[1] == 0.0:
        assert_same(prior, dict(ewc.fishers))


def test_fixed_needs_no_data():
    """With update "fixed" the end of a task folds and draws, and looks at no data."""
    model, ewc = with_prior(update="fixed")
    weight = model.fc.consolidated_weight()
    train(model, ewc, 0)
    weight = model.fc.consolidated_weight()
    ewc.end_task([])
    assert torch.equal(model.fc.weight, weight) and not model.fc.lora_B.any()
    assert ewc.history[-1].samples == 0
    for call in (lambda: ewc.estimate_fisher(loader(1)), lambda: ewc.accumulate_fisher().__enter__()):
        with pytest.raises(fe.FisherError, match="'fixed' keeps the F"):
            call()


def test_fixed_without_prior():
    """Without a prior the Fisher of the first task stays."""
    model = fresh()
    ewc = controller(model, update="fixed")
    train(model, ewc, 0)
    expected = fisher_of(model, 50)
    ewc.end_task(loader(50), F.cross_entropy)
    train(model, ewc, 1)
    ewc.end_task(loader(51), F.cross_entropy)
    close(ewc.fishers, expected)


@pytest.mark.parametrize(
    "options", [{}, {"update": "fixed"}, {"merge_mode": "factors"}, {"fisher": "factored"}]
)
@pytest.mark.parametrize("tasks", [0, 1])
def test_resume(options: dict[str, Any], tasks: int):
    """A saved state with a prior goes on in a fresh controller."""
    options = {"fisher_dtype": torch.float64, "ewc_lambda": 20.0, **options}
    model = fresh()
    ewc = fe.EWC(model, **options)
    ewc.estimate_fisher(loader(90), F.cross_entropy)
    ewc.consolidate_prior()
    for task in range(tasks):
        train(model, ewc, task)
        ewc.end_task(loader(50 + task), F.cross_entropy)
    saved, weights = copy.deepcopy(ewc.state_dict()), copy.deepcopy(model.state_dict())
    other = fresh()
    other.load_state_dict(weights)
    resumed = fe.EWC(other, **options)
    resumed.load_state_dict(saved)
    assert resumed.history == ewc.history and resumed.tasks == tasks
    for net, one in ((model, ewc), (other, resumed)):
        torch.manual_seed(5)
        train(net, one, 7)
        one.end_task(loader(57), F.cross_entropy)
    assert_same(whole(model, ewc), whole(other, resumed))


@pytest.mark.parametrize("structure", ["8bit", "factored", "kronecker", "uniform"])
def test_structures(structure: str):
    """A prior is kept as any Fisher of that structure."""
    options: dict[str, Any] = {"fisher_dtype": "8bit"} if structure == "8bit" else {"fisher": structure}
    found = []
    for prior in (True, False):
        model = fresh()
        ewc = fe.EWC(model, ewc_lambda=1.0, **options)
        ewc.estimate_fisher(loader(90), F.cross_entropy)
        torch.manual_seed(0)
        ewc.consolidate_prior() if prior else ewc.consolidate()
        found.append(dict(ewc.state_dict()["tensors"]))
    assert_same(*found)


def test_wrong_moments_refused():
    """A prior comes first, with a Fisher and untrained adapters; nothing has changed otherwise."""
    _, ewc = with_prior()
    for call, words in (
        (ewc.consolidate_prior, "expected no Fisher before it"),
        (controller(fresh()).consolidate_prior, "call estimate_fisher"),
    ):
        with pytest.raises(fe.FisherError, match=words):
            call()
    trained = adapted()
    ewc = controller(trained)
    ewc.estimate_fisher(loader(1), F.cross_entropy)
    before = whole(trained, ewc)
    with pytest.raises(fe.FisherError, match="expected untrained adapters"):
        ewc.consolidate_prior()
    assert_same(before, whole(trained, ewc))
    saved = with_prior()[1].state_dict()
    saved["config"]["history"][0]["prior"] = "yes"
    with pytest.raises(fe.FisherError, match="True or False for prior"):
        controller(fresh()).load_state_dict(saved)


def test_method():
    """The method with a prior is the controller with one; it comes before the first task."""
    method = EWCLoRA(fresh(), ewc_lambda=20.0, fisher_dtype=torch.float64)
    with pytest.raises(fe.FisherError, match="empty"):
        method.estimate_prior([])
    assert method.ewc.state_dict()["tensors"] == {}
    method.estimate_prior(loader(90), F.cross_entropy)
    method.begin_task(0)
    with pytest.raises(fe.ArgumentError, match="before the first task begins"):
        method.estimate_prior(loader(90), F.cross_entropy)
    model, ewc = with_prior()
    for net, one in ((method.model, method), (model, ewc)):
        torch.manual_seed(0)
        train(net, one, 0)
        one.end_task(loader(50), F.cross_entropy)
    assert_same(whole(method.model, method.ewc), whole(model, ewc))


def test_saved_with_adapters(tmp_path: Path):
    """A prior is saved and loaded with the adapters, before any task."""
    model, ewc = with_prior()
    fe.save_pretrained(tmp_path / "saved", model, ewc)
    other = fresh()
    loaded = controller(other)
    fe.load_pretrained(tmp_path / "saved", other, loaded)
    assert loaded.history == ewc.history and loaded.tasks == 0
    assert_same(dict(ewc.fishers), dict(loaded.fishers))
