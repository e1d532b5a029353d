# SPDX-License-Identifier: Apache-2.0
"""EWC on A and B apart, against a transcription in plain autograd, one sample at a time."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_checks import at_start
from tiny_models import KEYS, adapted, assert_same, batches, data, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import FactorEWC

LAMBDA, STEPS, RATE, SAMPLES = 30.0, 3, 0.1, 7
TASKS = 3


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A and B by the names of their Fishers."""
    qkv, fc = model.qkv, model.fc
    found = dict(zip(KEYS, (*qkv.adapter_parameters(), *fc.adapter_parameters()), strict=True))
    return {
        f"{key}:{part}": p for key, (_, *both) in found.items() for part, p in zip("AB", both, strict=True)
    }


def literal_fisher(model: nn.Module, x: Tensor, y: Tensor, sizes: list[int] | None) -> dict[str, Tensor]:
    """The mean over samples of squared gradients, or with sizes of batches n times those of means."""
    held = factors(model)
    total = {key: torch.zeros_like(p) for key, p in held.items()}
    for part, labels in zip(x.split(sizes or 1), y.split(sizes or 1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(part), labels), list(held.values()))
        for key, gradient in zip(held, gradients, strict=True):
            total[key] += len(part) * gradient.square() / len(x)
    return total


def literal(model: nn.Module, gamma: float, mode: str) -> dict[str, Tensor]:
    """The values of all trained parameters after three tasks."""
    fisher: dict[str, Tensor] = {}
    stars: dict[str, Tensor] = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for task in range(TASKS):
        for step in range(STEPS):
            x, y = data(SAMPLES, seed=10 * task + step)
            penalty = sum(
                (fisher[k] * (p - stars[k]).square()).sum() for k, p in factors(model).items() if fisher
            )
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y) + LAMBDA / 2 * penalty, trained)
            with torch.no_grad():
                for p, gradient in zip(trained, gradients, strict=True):
                    p -= RATE * gradient
        x, y = data(SAMPLES, seed=50 + task)
        new = literal_fisher(model, x, y, [4, 3] if mode == "batch" else None)
        fisher = {k: gamma * fisher[k] + f if fisher else f for k, f in new.items()}
        stars = {k: p.detach().clone() for k, p in factors(model).items()}
    return {**snapshot(model), **{f"F {key}": f for key, f in fisher.items()}}


def run(method: FactorEWC, tasks: range) -> None:
    trained = [p for p in method.model.parameters() if p.requires_grad]
    for task in tasks:
        method.begin_task(task)
        optimizer = torch.optim.SGD(trained, lr=RATE)
        for step in range(STEPS):
            x, y = data(SAMPLES, seed=10 * task + step)
            optimizer.zero_grad()
            (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, STEPS)
        method.end_task(batches(*data(SAMPLES, seed=50 + task), 4), F.cross_entropy)


@pytest.mark.parametrize(("mode", "gamma", "options"), [
    ("sample", 1.0, {}), ("sample", 0.6, {"calls": 2}), ("batch", 1.0, {}),
    ("sample", 0.0, {"lora_alpha": 5.0}),
])  # fmt: skip
def test_transcription(mode: str, gamma: float, options: dict[str, Any]):
    """Three tasks equal the transcription; nothing is folded into the base weights before the export."""
    models = [adapted(**options) for _ in range(2)]
    method = FactorEWC(models[0], ewc_lambda=LAMBDA, gamma=gamma, fisher_mode=mode)
    base = models[0].qkv.weight.clone()
    run(method, range(TASKS))
    expected = literal(models[1], gamma, mode)
    found = {**snapshot(models[0]), **{f"F {key}": f for key, f in method.fishers.items()}}
    assert found.keys() == expected.keys() and torch.equal(models[0].qkv.weight, base)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-9 * tensor.norm(), name
    assert [record.samples for record in method.history] == [SAMPLES] * TASKS
    x = data(4)[0]
    before = models[0](x)
    assert type(method.export().fc) is nn.Linear
    torch.testing.assert_close(models[0](x), before, rtol=1e-12, atol=1e-12)


def test_scales():
    """A scale per rank that is not trained takes part in both Fishers."""
    model = adapted()
    model.fc.lora_scale = nn.Parameter(torch.tensor([0.5, 3.0], dtype=torch.float64), requires_grad=False)
    method = FactorEWC(model, ewc_lambda=1.0)
    method.begin_task(0)
    x, y = data(5)
    method.end_task(batches(x, y, 2), F.cross_entropy)
    expected = literal_fisher(model, x, y, None)
    torch.testing.assert_close(method.fishers, expected, rtol=1e-10, atol=1e-14)


def test_exact_labels():
    """The expectation over classes is that of squared gradients of -log p."""
    model = adapted()
    method = FactorEWC(model, ewc_lambda=1.0, labels="exact")
    method.begin_task(0)
    x, y = data(3)
    method.end_task([(x, y)])
    p = model(x).softmax(-1)
    for key, parameter in factors(model).items():
        expected = torch.zeros_like(parameter)
        for n in range(3):
            for c in range(p.shape[1]):
                loss = F.cross_entropy(model(x[n : n + 1]), torch.tensor([c]))
                expected += p[n, c].detach() * torch.autograd.grad(loss, parameter)[0].square() / 3
        torch.testing.assert_close(method.fishers[key], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype):
    """Fishers and the penalty are fp32, and those of the same values in fp64 to its rounding of bf16."""
    values = []
    for used in (dtype, torch.float64):
        model = adapted().to(dtype).to(used)
        method = FactorEWC(model, ewc_lambda=1.0)
        method.begin_task(0)
        x, y = data(6, dtype=torch.float64)
        method.end_task([(x.to(dtype).to(used), y)], F.cross_entropy)
        with torch.no_grad():
            for p in factors(model).values():
                p.mul_(2.0)
        values.append(method.penalty())
        assert values[-1].dtype == torch.promote_types(used, torch.float32)
    # a chain of about ten roundings of eps each, in gradients that are squared
    torch.testing.assert_close(*values, rtol=40 * torch.finfo(dtype).eps, atol=0.0, check_dtype=False)


def test_resume():
    """A saved state goes on bit for bit in a fresh model."""
    whole = FactorEWC(at_start(), ewc_lambda=LAMBDA)
    run(whole, range(2))
    saved, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.model.state_dict())
    resumed = FactorEWC(at_start(), ewc_lambda=LAMBDA)
    resumed.load_state_dict(saved)
    resumed.model.load_state_dict(weights)
    for method in (whole, resumed):
        run(method, range(2, 3))
    assert_same(snapshot(whole.model, whole.fishers), snapshot(resumed.model, resumed.fishers))
    assert resumed.history == whole.history and len(whole.history) == 3


def test_states_refused():
    """A state that does not fit names what is wrong and changes nothing."""
    method = FactorEWC(at_start(), ewc_lambda=1.0)
    run(method, range(1))
    good = method.state_dict()

    def broken(**tensors: Tensor) -> dict[str, Any]:
        return {"tensors": {**good["tensors"], **tensors}, "config": good["config"]}

    fresh = FactorEWC(at_start(), ewc_lambda=1.0)
    cases = [
        (broken(**{"fisher.fc:A": torch.ones(3, 3)}), r"fisher of fc:A: expected numbers \[2, 6\]"),
        (broken(**{"fisher.fc:A": -torch.ones(2, 6)}), "squares for a Fisher"),
        (broken(**{"anchor.fc:B": torch.full((6, 2), torch.nan)}), "anchor of fc:B: expected finite"),
        (broken(**{"fisher.other:A": torch.ones(2, 6)}), "fisher.other:A differs"),
        ({**good, "config": {**good["config"], "history": []}}, "a record for each of 1 tasks"),
        ({**good, "config": {**good["config"], "history": [{"samples": 1}]}}, "expected records"),
        ({**good, "config": {**good["config"], "fisher_mode": "batch"}}, "fisher_mode"),
    ]
    for state, words in cases:
        with pytest.raises(fe.CheckpointError, match=words):
            fresh.load_state_dict(state)
        assert not fresh.fishers and fresh.tasks == 0


def test_failed_end():
    """An end that fails changes nothing, and can be repeated."""
    method = FactorEWC(at_start(), ewc_lambda=1.0)
    run(method, range(1))
    method.begin_task(1)
    x, y = data(4)
    before = snapshot(method.model, method.fishers, method.anchors)
    for loader, words in (([], "empty"), ([(x * torch.nan, y)], "NaN")):
        with pytest.raises(fe.FisherError, match=words):
            method.end_task(loader, F.cross_entropy)
        assert_same(before, snapshot(method.model, method.fishers, method.anchors))
    method.end_task([(x, y)], F.cross_entropy)
    assert method.tasks == 2


def test_optimizer_goes_on():
    """The adapters are the same ones after a task: an optimizer with their moments is no mistake."""
    model = at_start()
    method = FactorEWC(model, ewc_lambda=1.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    x, y = data(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fe.EWCLoRAWarning)
        for task in range(2):
            method.begin_task(task)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.end_task([(x, y)], F.cross_entropy)


def test_wrong_use_refused():
    """Values out of range, and adapters whose factors are not all that is trained."""
    wrong = {"ewc_lambda": -1.0, "gamma": 2.0, "fisher_mode": "mean", "labels": "given"}
    for words, value in wrong.items():
        options = {words: value}
        model = nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(fe.ArgumentError, match=words):
            FactorEWC(model, fe.LoRAConfig(r=1, target_modules=["0"]), **{"ewc_lambda": 1.0, **options})
        assert type(model[0]) is nn.Linear
    model = adapted()
    method = FactorEWC(model, ewc_lambda=1.0)
    model.fc.lora_scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.raises(fe.TargetError, match="fc: its lora_scale is trained"):
        method.begin_task(0)
    with pytest.raises(fe.TargetError, match="of another method"):
        FactorEWC(fe.methods.SDLoRA(adapted()).model, ewc_lambda=1.0)


def test_divided_adapter_refused():
    """An adapter whose outputs come from calls with inputs of their own has no gradient of lora_A in any."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            memory = x.sin()
            return self.attention(x, memory, memory)[0].mean(1)

    torch.manual_seed(0)
    model = Attending()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["attention"]))
    method = FactorEWC(model, ewc_lambda=1.0)
    method.begin_task(0)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(fe.FisherError, match="computes 4 of the 12 outputs of an adapter"):
        method.end_task([(x, y)], F.cross_entropy)
