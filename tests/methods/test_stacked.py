# SPDX-License-Identifier: Apache-2.0
"""O-LoRA and N-LoRA: every step against dense matrices and loops, and what a sequence of tasks promises."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_and_largest
from dense_tiny import Dense, close
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from tiny_models import KEYS, WIDTH, Tiny, adapted, assert_same, data, fresh, randomise, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import NLoRA, OLoRA, _overlap
from fused_ewclora.methods._factors import Factors
from fused_ewclora.methods._stacked import Stacked

CASES: dict[str, tuple[type[Stacked], dict[str, Any]]] = {
    "O-LoRA": (OLoRA, {"lambda_1": 0.7}),
    "O-LoRA, official": (OLoRA, {"lambda_1": 0.3, "lambda_2": 0.2, "variant": "official"}),
    "N-LoRA": (NLoRA, {"lambda_1": 0.05}),
    "N-LoRA, official": (NLoRA, {"lambda_1": 0.1, "variant": "official"}),
}
BOTH = [CASES["O-LoRA, official"], CASES["N-LoRA"]]
in_both = pytest.mark.parametrize(("kind", "options"), BOTH, ids=["O-LoRA", "N-LoRA"])


class Literal(Dense):
    """The sum over tasks with one matrix per task, and the penalties element by element."""

    def __init__(self, model: nn.Module, case: str, scale: float) -> None:
        self.past: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in KEYS}
        self.case, self.scale = case, scale
        super().__init__(model)

    def delta(self, key: str) -> Tensor:
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for a, b in (*self.past[key], (self.a[key], self.b[key])):
            for k in range(a.shape[0]):
                total = total + self.scale * torch.outer(b[:, k], a[k])
        return total

    def penalty(self) -> Tensor:
        options, total = CASES[self.case][1], torch.zeros((), dtype=torch.float64)
        for key in KEYS:
            a, b = self.a[key], self.b[key]
            terms = []
            if self.case.startswith("O"):
                dots = [u @ v for old, _ in self.past[key] for u in old for v in a]
                terms = [dot.abs() if "official" in self.case else dot * dot for dot in dots]
            elif "official" in self.case:
                terms = [(u @ v).abs() for u in a for v in b.T]
            else:
                terms = [(self.scale * row @ column).abs() for row in b for column in a.T]
            for term in terms:
                total = total + options["lambda_1"] * term
            for factor in (a, b) if options.get("lambda_2") else ():
                if bool(factor.any()):  # else the slope of the norm is 0
                    total = total + options["lambda_2"] * (factor**2).sum().sqrt()
        return total

    def freeze(self) -> None:
        for key in KEYS:
            self.past[key].append((self.a[key].detach(), self.b[key].detach()))


def factors(model: nn.Module) -> dict[str, Factors]:
    layers = fe.adapters(model).values()
    return dict(
        zip(KEYS, (Factors.of(layer, p) for layer in layers for p in layer.adapter_slices), strict=True)
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


def train(method: Stacked, seed: int, steps: int = 2) -> None:
    optimizer = optimizer_of(method.model)
    for step in range(steps):
        x, y = data(8, seed=100 * seed + step, dtype=method.model.head.weight.dtype)
        optimizer.zero_grad()
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, steps)


def run(method: Stacked, tasks: range, steps: int = 2) -> Stacked:
    for task in tasks:
        method.begin_task(task)
        train(method, task, steps)
        method.end_task([])
    return method


def seeded(kind: type[Stacked], model: nn.Module, **options: Any) -> Stacked:
    return kind(model, generator=torch.Generator().manual_seed(3), **options)


@pytest.mark.parametrize("lora_alpha", [None, 3.0])
@pytest.mark.parametrize("case", CASES)
def test_literal_three_tasks(case, lora_alpha):
    """Every step of three tasks is that of dense matrices."""
    kind, options = CASES[case]
    model = fresh(lora_alpha=lora_alpha)
    method = kind(model, **options)
    dense = Literal(model, case, 1.0 if lora_alpha is None else lora_alpha / 2)
    felt = []
    for task in range(3):
        method.begin_task(task)
        if task != 1:  # B is 0 at the start of that one
            randomise(model)
        dense.read_adapters(model)
        leaves = [*dense.a.values(), *dense.b.values(), *dense.head.values()]
        ours, literal = optimizer_of(model), torch.optim.SGD(leaves, lr=0.05, momentum=0.5)
        for step in range(3):
            x, y = data(8, seed=10 * task + step)
            values = []
            for optimizer, forward, one in ((ours, model, method), (literal, dense.logits, dense)):
                optimizer.zero_grad()
                penalty = one.penalty()
                (F.cross_entropy(forward(x), y) + penalty).backward()
                optimizer.step()
                values.append(penalty.detach())
            close(*values, 1e-9, "penalty")
            felt.append(float(values[0]))
            for key, now in factors(model).items():
                close(now.lora_A, dense.a[key], 1e-9, f"A of {key}")
                close(now.lora_B, dense.b[key], 1e-9, f"B of {key}")
            dense.assert_is(model)
        method.end_task([])
        dense.freeze()
        dense.b = {key: torch.zeros_like(b) for key, b in dense.b.items()}
        dense.assert_is(model)
    assert sum(value > 1e-3 for value in felt) >= 6  # else the case shows nothing


@in_both
def test_one_call(kind, options):
    """After two tasks a layer is one adapter of three times the rank, of which the last third is trained."""
    method = run(kind(adapted(), **options), range(2))
    model = method.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"{layer}.lora_{f}{k}" for f in "AB" for layer, k in (("qkv", "_k"), ("qkv", "_v"), ("fc", ""))),
        "head.weight", "head.bias",
    }  # fmt: skip
    assert [a.lora_a.shape[0] for layer in fe.adapters(model).values() for a in layer.composed()] == [6] * 3
    before = snapshot(model)
    method.begin_task(2)
    train(method, 2)
    for name, value in snapshot(model).items():
        assert torch.equal(value, before[name]) == ("lora" not in name and "head" not in name) or (
            "past" in name
        )
        if "past" in name:
            assert torch.equal(value, before[name])


@in_both
@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_resume_bitwise(kind, options, tasks):
    """Training resumes bit for bit in a new model, whose weights are loaded after the method."""
    method = run(seeded(kind, adapted(), **options), range(tasks))
    file = io.BytesIO()
    torch.save([method.state_dict(), method.model.state_dict()], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    other = seeded(kind, adapted(seed=5), **options)
    other.load_state_dict(saved)
    other.model.load_state_dict(weights)
    other.generator.set_state(method.generator.get_state())
    assert other.report().to_dict() == method.report().to_dict()
    for each in (method, other):
        run(each, range(tasks, tasks + 2))
    assert_same(snapshot(method.model), snapshot(other.model))


def test_bad_states():
    """A state that does not fit is named and changes nothing."""
    good = run(OLoRA(adapted()), range(2)).state_dict()
    target = run(OLoRA(adapted()), range(1))
    before = snapshot(target.model)
    name = "fc.lora_past_B"
    for saved, words in (
        ({}, "the dictionary that state_dict"),
        (
            {**good, "config": {**good["config"], "tasks": 3}},
            r"expected shape \[6, 6\] \(3 tasks of rank 2\)",
        ),
        ({**good, "config": {**good["config"], "method": "NLoRA"}}, "method: expected 'OLoRA', got 'NLoRA'"),
        ({**good, "tensors": {**good["tensors"], name: None}}, f"{name}: expected a floating-point tensor"),
        (
            {**good, "tensors": {**good["tensors"], name: torch.full((6, 4), torch.nan)}},
            f"{name}: expected finite",
        ),
    ):
        with pytest.raises(fe.CheckpointError, match=words):
            target.load_state_dict(saved)
    target.begin_task(1)
    for refused in (lambda: target.load_state_dict(good), target.state_dict):
        with pytest.raises(fe.ArgumentError, match="has not ended"):
            refused()
    assert target.tasks == 1
    assert_same(snapshot(target.model), before)


@in_both
@pytest.mark.parametrize("cause", ["NaN", "merged"])
def test_failed_task_retry(kind, options, cause):
    """A task that cannot end changes nothing and can be ended again."""
    method, other = (seeded(kind, adapted(), **options) for _ in range(2))
    for each in (method, other):
        run(each, range(1))
        each.begin_task(1)
        train(each, 1)
    lora_b = method.model.fc.lora_B
    good = lora_b.detach().clone()
    if cause == "NaN":
        lora_b.data[1, 0] = torch.nan
    else:
        fe.merge(method.model)
    before = snapshot(method.model)
    words = "end_task: lora_B of fc: expected finite" if cause == "NaN" else "qkv: its adapter is merged"
    with pytest.raises(fe.EWCLoRAError, match=words):
        method.end_task([])
    assert_same(before, snapshot(method.model))
    if cause == "merged":
        fe.unmerge(method.model)
    lora_b.data.copy_(good)
    for each in (method, other):
        each.end_task([])
    assert method.tasks == 2
    assert_same(snapshot(method.model), snapshot(other.model))


@in_both
def test_export_plain(kind, options):
    """The end is a plain model that computes the same; files that would lose factors are refused before."""
    model = adapted(lora_alpha=3.0)
    method = run(kind(model, **options), range(4))
    x, _ = data(4)
    expected = model(x)
    with pytest.raises(fe.CheckpointError, match=rf"saved and loaded by state_dict\(\) of {kind.__name__}"):
        fe.save_pretrained("unused", model)
    assert method.export() is model
    assert model.state_dict().keys() == Tiny().state_dict().keys() and type(model.qkv) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_compiles():
    """The model is one graph."""
    model = run(OLoRA(adapted()), range(2)).model
    x, _ = data(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_low_precision(case):
    """Weights in bf16 keep factors and penalties in fp32, whatever autocast says."""
    kind, options = CASES[case]
    method = run(kind(adapted(dtype=torch.bfloat16), **options), range(2))
    method.begin_task(2)
    train(method, 2)
    assert {t.dtype for now in factors(method.model).values() for t in vars(now).values()} == {torch.float32}
    x, y = data(4, dtype=torch.bfloat16)
    penalty = method.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        again = method.penalty()
        assert F.cross_entropy(method.model(x), y).isfinite()
    assert penalty.dtype == torch.float32 and torch.equal(penalty, again) and float(penalty.detach()) > 0.0


def test_no_strength():
    """With a strength of 0, and in O-LoRA's first task, the penalty is 0 and may be backpropagated."""
    for method in (OLoRA(adapted()), NLoRA(adapted(), lambda_1=0.0)):
        method.begin_task(0)
        assert method.penalty().item() == 0.0
        method.penalty().backward()


@given(seeds, st.integers(0, 4), st.sampled_from((0.0, 0.3, 1.0)), st.sampled_from((1, 100, 2**22)))
@settings(max_examples=30)
def test_collisions(seed, count, threshold, block):
    """Shares by blocks are those of whole matrices."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 7), (5, 2))
    tasks = [tuple(torch.randn(shape, generator=generator).round() for shape in shapes) for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_overlap, "BLOCK_BYTES", block)
        found = _overlap.collisions(tasks, threshold)
    assert found.shape == (count, count)
    there = [(b @ a).abs() > threshold * (b @ a).abs().max() for a, b in tasks]
    for i in range(count):
        for j in range(count):
            assert float(found[i, j]) == int((there[i] & there[j]).sum()) / 35


def test_overlaps():
    """0 for rows orthogonal to all earlier ones, 1 for rows inside of their span, 1/2 between."""
    e, b = torch.eye(6, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    a = [e[:2], e[2:4], torch.stack([e[0] - e[3], 2 * e[1]]), e[3:5], torch.zeros_like(e[:2])]
    assert _overlap.overlaps([(one, b) for one in a]) == pytest.approx((0.0, 0.0, 1.0, 0.5, 0.0), abs=1e-12)


def test_reports():
    """Penalties do what they are for: less overlap, less that is large in two tasks."""
    overlap, dense = [], []
    for strength in (0.0, 3.0):
        method = run(seeded(OLoRA, adapted(), lambda_1=strength), range(3), steps=12)
        overlap.append(method.report().summary["overlap"])
        assert method.report().summary["tasks"] == 3 and "fc" in str(method.report())
    for strength in (0.0, 0.01):
        report = run(seeded(NLoRA, fresh(), lambda_1=strength), range(3), steps=12).report(threshold=0.2)
        dense.append(report.summary["collisions"])
        assert [row["rank"] for row in report.rows] == [6, 6, 6]
        assert all(len(row["densities"]) == len(row["overlaps"]) == 3 for row in report.rows)
    assert overlap[1] < 0.5 * overlap[0] and dense[1] < dense[0]
    assert NLoRA(adapted(), lambda_1=1.0).report().summary == {"tasks": 0, "collisions": 0.0}


@in_both
def test_memory(kind, options):
    """A training step in the third task, and the report, make nothing as large as a weight."""
    torch.set_num_threads(1)
    size = 1024
    model = nn.Sequential(nn.Linear(size, size))
    method = kind(model, fe.LoRAConfig(r=4, target_modules=["0"]), **options)
    for task in range(3):
        method.begin_task(task)
        nn.init.normal_(model[0].lora_B)
        if task < 2:
            method.end_task([])
    x = torch.randn(8, size)

    def step() -> None:
        (model(x).square().mean() + method.penalty()).backward()
        method.after_step(0, 1)

    step()
    for call in (step, method.report):
        assert peak_and_largest(call)[1] <= size * size * 2  # a weight has twice as much


def test_refusals():
    """Bad arguments and adapters that do not fit are named and change nothing."""
    for kind, options, words in (
        (OLoRA, {"lambda_1": -1.0}, "lambda_1: expected a finite number >= 0"),
        (OLoRA, {"lambda_2": float("inf")}, "lambda_2: expected a finite number >= 0"),
        (OLoRA, {"variant": "l1"}, "variant: expected one of"),
        (NLoRA, {"lambda_1": float("nan")}, "lambda_1: expected a finite number >= 0"),
        (NLoRA, {"lambda_1": 1.0, "variant": "l1"}, "variant: expected one of"),
    ):
        model = adapted()
        before = snapshot(model)
        with pytest.raises(fe.ArgumentError, match=words):
            kind(model, **options)
        assert_same(snapshot(model), before)
        assert model.fc.composer is None
    with pytest.raises(fe.TargetError, match="qkv: expected plain adapters, got those of another method"):
        NLoRA(OLoRA(adapted()).model, lambda_1=1.0)
    gated = adapted()
    gated.qkv.lora_scale_k = nn.Parameter(torch.ones(2))
    with pytest.raises(
        fe.TargetError, match="qkv: expected adapters without learned scales, got lora_scale_k"
    ):
        OLoRA(gated)
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(
        fe.TargetError, match=r"0: variant 'official' .*as many outputs as inputs, got 6 and 4"
    ):
        NLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), lambda_1=1.0, variant="official")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(fe.ArgumentError, match="threshold"):
        NLoRA(adapted(), lambda_1=1.0).report(threshold=-1.0)
