# SPDX-License-Identifier: Apache-2.0
"""P&M against a literal transcription, over four tasks, and what its coefficients promise."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import Dense, close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KEYS, WIDTH, Tiny, adapted, assert_same, batches, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import PerturbAndMerge
from fused_ewclora.methods._coefficients import Coefficients


class Literal(Dense):
    """Every W_i and every F_i as a matrix of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.start = {key: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for key in KEYS}  # merged so far
        self.ends: list[dict[str, Tensor]] = []
        self.fishers: list[dict[str, Tensor]] = []
        self.factor = 1.0
        self.factors: dict[str, float] = {}

    def delta(self, key: str) -> Tensor:
        return super().delta(key) * self.factors.get(key, self.factor)

    def end(self, x: Tensor, y: Tensor, per_module: bool) -> tuple[float, dict[str, float]]:
        """The coefficient, unlimited, and what each adapter is merged with; it is merged."""
        self.factor = 1.0
        total = {key: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for key in KEYS}
        for n in range(len(x)):
            grads = self.weight_gradients(
                lambda n=n: F.cross_entropy(self.logits(x[n : n + 1]), y[n : n + 1])
            )
            for key, gradient in grads.items():
                total[key] += gradient.square() / len(x)
        vector = {key: self.delta(key).detach() for key in KEYS}
        self.fishers.append(total)
        self.ends.append({key: self.start[key] + vector[key] for key in KEYS})

        def solution(keys: tuple[str, ...]) -> float:
            over = under = 0.0
            for key in keys:
                for fisher, end in zip(self.fishers, self.ends, strict=True):
                    over -= float(((self.start[key] - end[key]) * fisher[key] * vector[key]).sum())
                    under += float((vector[key] * fisher[key] * vector[key]).sum())
            return over / under

        together = solution(KEYS)
        alone = {key: solution((key,)) if per_module else together for key in KEYS}
        self.factors = {key: min(max(a, 0.0), 1.0) for key, a in alone.items()}
        self.start = {key: self.start[key] + self.factors[key] * vector[key] for key in KEYS}
        self.merge()
        merged, self.factors = self.factors, {}
        return together, merged


def made(model: nn.Module, **options) -> PerturbAndMerge:
    wide = {"fisher_dtype": torch.float64} if model.fc.weight.dtype == torch.float64 else {}
    return PerturbAndMerge(model, **{"generator": torch.Generator().manual_seed(3), **wide, **options})


def train(method: PerturbAndMerge, seed: int, steps: int = 3) -> None:
    dtype = method.model.fc.weight.dtype
    optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.1)
    method.model.train()
    for step in range(steps):
        x, y = data(8, seed=100 * seed + step, dtype=dtype)
        optimizer.zero_grad()
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, steps)


def run(method: PerturbAndMerge, tasks: range) -> None:
    for task in tasks:
        method.begin_task(task)
        train(method, task)
        x, y = data(6, seed=task, dtype=method.model.fc.weight.dtype)
        method.end_task(batches(x, y, 4), F.cross_entropy)


def everything(method: PerturbAndMerge) -> dict[str, Tensor]:
    return snapshot(method.model, method.ewc.fishers, method._curvature.gradients)


@pytest.mark.parametrize("per_module", [False, True])
def test_literal_four_tasks(per_module):
    """Four tasks are those of the literal algorithm, with its perturbations and its coefficients."""
    model = fresh(lora_alpha=3.0)
    method = made(model, epsilon=0.4, per_module=per_module)
    dense = Literal(model)
    drawn = set()
    for task in range(4):
        x, y = data(6, seed=task)
        method.begin_task(task)
        dense.read_adapters(model)
        dense.w = {key: torch.full((2,), 1.5, dtype=torch.float64) for key in KEYS}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        leaves = [*dense.a.values(), *dense.b.values(), *dense.head.values()]
        literal = torch.optim.Adam(leaves, lr=0.1)
        for step in range(4):
            drawn.add(method._scaled.perturbation)
            dense.factor = 1.0 + method._scaled.perturbation
            optimizer.zero_grad()
            (F.cross_entropy(model.train()(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, 4)
            literal.zero_grad()
            F.cross_entropy(dense.logits(x), y).backward()
            literal.step()
            dense.factor = 1.0
            model.eval()
            close(model(x), dense.logits(x).detach(), 1e-9, "evaluation without perturbation")
        solution, merged = dense.end(x, y, per_module)
        method.end_task(batches(x, y, 4), F.cross_entropy)
        assert method.coefficients[-1] == pytest.approx(merged, rel=1e-9)
        assert method.report().summary["solutions"][-1] == pytest.approx(solution, rel=1e-9)
        for name in ("qkv", "fc"):
            close(getattr(model, name).weight, dense.weights[name], 1e-9, name)
        for key in KEYS:
            expected = sum(
                f[key] * (dense.start[key] - e[key]) for f, e in zip(dense.fishers, dense.ends, strict=True)
            )
            close(method._curvature.gradients[key], expected, 1e-9, f"G of {key}")
            close(method.ewc.fishers[key], sum(f[key] for f in dense.fishers), 1e-9, f"F of {key}")
    assert drawn == {0.0, 0.4, -0.4}
    assert set(method.coefficients[0].values()) == {1.0}
    assert all(0.0 < a < 1.0 for a in method.coefficients[-1].values()), "the case must merge a share"


def test_merge_minimises():
    """No other coefficient has a smaller second-order loss of all tasks."""
    model = fresh()
    method = made(model)
    run(method, range(2))
    method.begin_task(2)
    train(method, 2)
    old = {key: fisher.clone() for key, fisher in method.ewc.fishers.items()}
    gradient = {key: g.clone() for key, g in method._curvature.gradients.items()}
    adapters_ = {ref.key: ref.matrices() for ref in method._curvature.refs}
    vector = {key: (b @ a).detach() for key, (a, b) in adapters_.items()}
    method.end_task(batches(*data(6, seed=2), 4), F.cross_entropy)
    merged = method.coefficients[-1]["fc"]

    def loss(a: float) -> float:
        total = 0.0
        for key, d in vector.items():
            own = method.ewc.fishers[key] - old[key]
            total += float((a * gradient[key] * d).sum() + (old[key] * (a * d).square()).sum() / 2)
            total += float((own * ((a - 1.0) * d).square()).sum() / 2)
        return total

    assert all(loss(merged) <= loss(a) + 1e-15 for a in torch.linspace(0, 1, 101).tolist())


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(0, 10)), min_size=1, max_size=4),
    st.booleans(),
)
def test_coefficients_limited(pairs, per_module):
    """Coefficients are in [0, 1], those of one ratio or one each, and 1 where nothing is known."""
    terms = {str(i): (n * d, d) for i, (n, d) in enumerate(pairs)}
    found = Coefficients.solving(terms, per_module)
    assert all(0.0 <= a <= 1.0 for a in found.merged.values())
    if per_module:
        for key, (over, under) in terms.items():
            expected = min(max(over / under, 0.0), 1.0) if under else 1.0
            assert found.merged[key] == expected
    else:
        assert len(set(found.merged.values())) == 1
    assert Coefficients.solving({"a": (0.0, 0.0)}, per_module).merged == {"a": 1.0}


def test_perturbations_reproducible():
    """One seed gives the same perturbations; each has its probability."""
    drawn = []
    for _ in range(2):
        method = made(fresh(), epsilon=0.25, probabilities=(0.5, 0.5, 0.0))
        method.begin_task(0)
        drawn.append([])
        for step in range(200):
            drawn[-1].append(method._scaled.perturbation)
            method.after_step(step, 200)
    assert drawn[0] == drawn[1] and set(drawn[0]) == {0.0, 0.25}
    # 5 standard deviations of 200 draws of 1/2.
    assert abs(drawn[0].count(0.0) - 100) < 36


def test_resume_bitwise():
    """Training resumes bit for bit in a new model."""
    method = made(fresh())
    run(method, range(2))
    file = io.BytesIO()
    torch.save([method.model.state_dict(), method.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = made(fresh(seed=4))
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    other.generator.set_state(method.generator.get_state())
    before = everything(method)
    assert_same(before, everything(other))
    run(other, range(2, 4))
    assert_same(everything(method), before)
    run(method, range(2, 4))
    assert_same(everything(method), everything(other))
    assert method.report().to_dict() == other.report().to_dict() and method.coefficients == other.coefficients


def test_bad_state_unchanged():
    """A state that does not fit changes nothing."""
    method, target = made(fresh()), made(fresh())
    run(method, range(2))
    run(target, range(1))
    before, good = everything(target), method.state_dict()

    def refused(match, tensors=None, error=fe.CheckpointError, **config):
        saved = {"tensors": tensors or good["tensors"], "config": good["config"] | config}
        with pytest.raises(error, match=match):
            target.load_state_dict(saved)

    def without(name):
        return {key: tensor for key, tensor in good["tensors"].items() if key != name}

    refused("gradients: expected those of", without("gradient.fc"))
    refused("gradient of fc: expected finite", {**good["tensors"], "gradient.fc": torch.zeros(2, 2)})
    refused("fisher", without("fisher.fc"), fe.FisherError)
    refused("coefficients: expected one of every adapter for 2 tasks, got 0", coefficients=None)
    nan = {**good["config"]["coefficients"][0], "solution": math.nan}
    refused("for 2 tasks, got 1", coefficients=[nan, good["config"]["coefficients"][1]])
    refused("method: expected 'PerturbAndMerge'", method="LoRA")
    assert_same(everything(target), before)
    target.ewc.load_state_dict(method.ewc.state_dict())
    with pytest.raises(fe.ArgumentError, match="begin_task: expected an EWC of 1 tasks, the method's own"):
        target.begin_task(1)


@pytest.mark.parametrize("cause", ["adapter", "loader", "data", "merged", "weight"])
def test_failed_task_retry(cause):
    """A task that cannot end changes nothing and can be ended again."""
    method, other = made(fresh()), made(fresh())
    x, y = data(6, seed=1)
    for each in (method, other):
        run(each, range(1))
        each.begin_task(1)
        train(each, 1)
    model, kept = method.model, copy.deepcopy(method.model.state_dict())
    with torch.no_grad():
        if cause == "adapter":
            model.fc.lora_A[0] = torch.inf
        if cause == "weight":
            model.fc.weight[0, 0] = 1e308
            model.fc.weight[0, 1:] = torch.inf
    if cause == "merged":
        fe.merge(model)
    before, drawn = everything(method), method.generator.get_state()
    loader = {"loader": [], "data": [(x * torch.nan, y)]}.get(cause, [(x, y)])
    with pytest.raises(fe.EWCLoRAError):
        method.end_task(loader, F.cross_entropy)
    assert_same(everything(method), before)
    assert method.tasks == 1 and len(method.coefficients) == 1
    method.generator.set_state(drawn)
    if cause == "merged":
        fe.unmerge(model)
    model.load_state_dict(kept)
    for each in (method, other):
        each.end_task([(x, y)], F.cross_entropy)
    assert_same(everything(method), everything(other))


def test_untrained_task_merges():
    """A task vector of 0 has nothing to be solved for, and is merged as it is."""
    method = made(fresh())
    run(method, range(1))
    before = method.model.fc.weight.clone()
    method.begin_task(1)
    method.end_task([data(6)], F.cross_entropy)
    assert set(method.coefficients[-1].values()) == {1.0}
    assert torch.equal(method.model.fc.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Weights of low precision are merged in single precision, and exported as plain layers."""
    model = fresh(dtype=dtype)
    method = made(model, fisher_dtype=torch.bfloat16)
    run(method, range(3))
    assert all(0.0 <= a <= 1.0 for task in method.coefficients for a in task.values())
    assert {g.dtype for g in method._curvature.gradients.values()} == {torch.float32}
    x, _ = data(4, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype and y.isfinite().all()
    assert torch.equal(copy.deepcopy(model)(x), y)
    plain = method.export()
    assert type(plain.fc) is nn.Linear and plain.state_dict().keys() == Tiny().state_dict().keys()
    assert torch.equal(plain(x), y), "adapters that have been reset add nothing"


def test_compiled_perturbations():
    """A compiled model has the perturbation of every step."""
    model = fresh()
    method = made(model, probabilities=(0.2, 0.4, 0.4))
    method.begin_task(0)
    train(method, 0)
    compiled, seen = torch.compile(model, backend="eager", fullgraph=True), set()
    x, _ = data(4)
    for step in range(12):
        y = model.train()(x)
        seen.add(float(y.detach().sum()))
        torch.testing.assert_close(compiled(x), y, rtol=1e-12, atol=1e-12)
        method.after_step(step, 12)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.5}, "epsilon: expected a finite number >= 0"),
        ({"probabilities": (0.5, 0.5)}, "probabilities: expected three, of 0"),
        ({"probabilities": (0.5, 0.5, 0.5)}, "probabilities: expected three with the sum 1"),
        ({"probabilities": (1.5, -0.5, 0.0)}, r"probabilities\[0\]: expected a finite number"),
        ({"fisher_dtype": "8bit"}, "fisher_dtype: expected a torch.dtype"),
        ({"fisher_dtype": torch.float64}, "fisher_dtype: expected one of"),
    ],
)
def test_bad_arguments(options, message):
    """Bad arguments are named and change nothing."""
    model = Tiny()
    before = snapshot(model)
    with pytest.raises(fe.EWCLoRAError, match=message):
        PerturbAndMerge(model, fe.LoRAConfig(r=2, target_modules=["fc"]), **options)
    assert_same(snapshot(model), before)
    assert not fe.adapters(model)
    other = adapted()
    made(other)
    with pytest.raises(fe.TargetError, match="qkv: expected plain adapters"):
        made(other)
