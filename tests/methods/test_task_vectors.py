# SPDX-License-Identifier: Apache-2.0
"""IEL and ITA against a literal transcription, over three tasks, and what their task vectors promise."""

from __future__ import annotations

import copy
import io
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from task_vector_literal import LiteralVectors
from tiny_models import KEYS, Tiny, adapted, assert_same, batches, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import IEL, ITA, _composed
from fused_ewclora.methods._composed import Composed

KINDS = {IEL: "beta", ITA: "alpha"}
BOTH = ((IEL, "paper"), (ITA, "official"))


def made(kind: type[Composed], model: nn.Module, strength: float = 3.0, **options) -> Composed:
    wide = {"fisher_dtype": torch.float64} if model.fc.weight.dtype == torch.float64 else {}
    options = {**wide, "generator": torch.Generator().manual_seed(3), **options}
    return kind(model, **{KINDS[kind]: strength}, **options)


def train(method: Composed, seed: int, steps: int = 2) -> None:
    dtype = method.model.fc.weight.dtype
    optimizer = torch.optim.Adam([p for p in method.model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        x, y = data(8, seed=100 * seed + step, dtype=dtype)
        optimizer.zero_grad()
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, steps)


def run(method: Composed, tasks: range) -> None:
    for task in tasks:
        method.begin_task(task)
        method.prepare(batches(*data(6, seed=task, dtype=method.model.fc.weight.dtype), 4))
        train(method, task)
        method.end_task([])


def everything(method: Composed) -> dict[str, Tensor]:
    return snapshot(method.model, method.fishers)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("kind", KINDS)
def test_literal_three_tasks(kind, variant, decoupled):
    """Three tasks are those of the literal algorithm, in and beside the loss."""
    model = fresh(lora_alpha=3.0)
    strength = 300.0
    method = made(kind, model, strength, variant=variant)
    dense = LiteralVectors(model, kind is IEL, strength, variant, 1.5)
    penalties = []
    for task in range(3):
        x, y = data(6, seed=task)
        method.begin_task(task)
        dense.begin(model, x)
        method.prepare(batches(x, y, 4))
        if variant == "paper" or kind is IEL:
            for key in KEYS:
                torch.testing.assert_close(method.fishers[key], dense.fisher(key), rtol=1e-11, atol=1e-13)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        matrices = [*dense.a.values(), *dense.b.values()]
        literal = torch.optim.Adam([*matrices, *dense.head.values()], lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            literal.zero_grad()
            torch.testing.assert_close(method.penalty(), dense.penalty(), rtol=1e-9, atol=1e-12)
            loss, expected = F.cross_entropy(model(x), y), F.cross_entropy(dense.logits(x), y)
            if decoupled:
                loss.backward()
                returned = method.decoupled_step_(0.5, clip_grad=0.1)
                torch.testing.assert_close(returned, dense.penalty().detach(), rtol=1e-9, atol=1e-12)
                expected.backward()
                gradients = torch.autograd.grad(dense.penalty(), matrices, allow_unused=True)
                with torch.no_grad():
                    for matrix, gradient in zip(matrices, gradients, strict=True):
                        norm = float(gradient.square().sum().sqrt())
                        matrix -= 0.5 * gradient * min(0.1 / (norm + 1e-6), 1.0)
            else:
                (loss + method.penalty()).backward()
                (expected + dense.penalty()).backward()
            optimizer.step()
            literal.step()
            method.after_step(step, 3)
            dense.assert_is(model)
        penalties.append(abs(float(method.penalty().detach())))
        method.end_task([])
        dense.end()
        dense.assert_is(model)
    assert min(penalties[1:]) > 1e-3, "the case must feel the penalty"
    assert (penalties[0] == 0.0) == (kind is IEL and variant == "paper")
    expected = model(data(4)[0])
    method.export()
    assert model.state_dict().keys() == Tiny().state_dict().keys() and type(model.qkv) is nn.Linear
    torch.testing.assert_close(model(data(4)[0]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_compose_tasks(kind):
    """The model is W0 plus the mean of the task vectors that are chosen."""
    model = fresh()
    base = {name: layer.weight.clone() for name, layer in fe.adapters(model).items()}
    method = made(kind, model)
    vectors = []
    for task in range(3):
        run(method, range(task, task + 1))
        method.compose([task])
        vectors.append({n: layer.consolidated_weight() - base[n] for n, layer in fe.adapters(model).items()})
    x, _ = data(4)
    for chosen in ((0, 1, 2), (2, 0), (1,), ()):
        method.compose(chosen)
        for name, layer in fe.adapters(model).items():
            mean = sum(vectors[k][name] for k in chosen) / max(len(chosen), 1)
            torch.testing.assert_close(layer.consolidated_weight(), base[name] + mean, rtol=0, atol=1e-13)
    nothing = model(x)
    method.compose()
    assert not torch.equal(model(x), nothing)
    with method.pretrained():
        assert torch.equal(model(x), nothing)
    lengths = method.report().rows[-1]
    fc = [v["fc"].square().sum().sqrt().item() for v in vectors]
    assert [lengths[f"task {k}"] for k in range(3)] == pytest.approx(fc, rel=1e-12)
    method.compose([1])
    expected = model(x)
    torch.testing.assert_close(method.export()(x), expected, rtol=1e-12, atol=1e-12)


def test_one_call_per_layer(monkeypatch):
    """A layer makes one call of the LoRA linear and a step one of the penalty, for any number of tasks."""
    model = fresh()
    method = made(IEL, model)
    run(method, range(3))
    counts, original = [], fe.functional.lora_linear_adapters
    monkeypatch.setattr(
        fe.functional,
        "lora_linear_adapters",
        lambda *args, **more: counts.append([a.lora_a.shape[0] for a in args[3]]) or original(*args, **more),
    )
    penalties, penalty = [], fe.functional.ewc_penalty
    method.begin_task(3)
    method.prepare([data(2)])
    counts.clear()
    monkeypatch.setattr(
        fe.functional,
        "ewc_penalty",
        lambda *args: penalties.append([a.shape[0] for a in args[1]]) or penalty(*args),
    )
    model(data(2)[0])
    method.penalty().backward()
    assert counts == [[8, 8], [8]] and penalties == [[8, 8, 8]]


@pytest.mark.parametrize(("kind", "variant"), BOTH)
def test_resume_bitwise(kind, variant):
    """Training resumes bit for bit in a new model."""
    method = made(kind, fresh(), variant=variant)
    run(method, range(2))
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "head": method.model.head.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = made(kind, fresh(), variant=variant)
    other.load_state_dict(saved["method"])
    other.model.head.load_state_dict(saved["head"])
    other.generator.set_state(method.generator.get_state())
    assert_same(everything(method), everything(other))
    x, _ = data(4)
    assert torch.equal(method.model(x), other.model(x))
    before = everything(method)
    run(other, range(2, 4))
    assert_same(everything(method), before)
    run(method, range(2, 4))
    assert_same(everything(method), everything(other))
    assert method.report().to_dict() == other.report().to_dict()


def test_bad_state_unchanged():
    """A state that does not fit changes nothing."""
    method, target = made(IEL, fresh()), made(IEL, fresh())
    run(method, range(2))
    run(target, range(1))
    before, good = everything(target), method.state_dict()

    def refused(saved, match, error=fe.CheckpointError, by=target):
        with pytest.raises(error, match=match):
            by.load_state_dict(saved)

    def changed(name, value):
        return good | {"tensors": good["tensors"] | {name: value}}

    refused({}, "the dictionary that state_dict")
    refused(
        good | {"config": good["config"] | {"variant": "official"}},
        "variant: it was made with 'official', this .* has 'paper'",
    )
    refused(good | {"config": good["config"] | {"tasks": 3}}, r"qkv.k.lora_past_A: expected shape \[6, 6\]")
    refused(good | {"config": good["config"] | {"fingerprints": None}}, "qkv: it belongs to other base")
    refused(changed("fc.lora_B", torch.full((6, 2), torch.nan)), "fc.lora_B: expected finite values")
    refused(changed("fc.lora_A", None), r"fc.lora_A: expected shape \[2, 6\], got NoneType")
    refused(changed("fisher.fc", torch.zeros(2, 2)), "fisher of fc", fe.FisherError)
    refused(good, "method: expected 'ITA', got 'IEL'", by=made(ITA, fresh()))
    refused(good, "other base weights", by=made(IEL, fresh(seed=9)))
    assert_same(everything(target), before)
    target.begin_task(1)
    with pytest.raises(fe.ArgumentError, match="load_state_dict: task 1 has not ended"):
        target.load_state_dict(good)
    with pytest.raises(fe.ArgumentError, match="state_dict: task 1 has not ended"):
        target.state_dict()


@pytest.mark.parametrize(("kind", "variant"), BOTH)
def test_failures_unchanged(kind, variant, monkeypatch):
    """A pass or a task that fails changes nothing and can be repeated."""
    method, other = (made(kind, fresh(), variant=variant) for _ in range(2))
    x, y = data(6, seed=1)
    for each in (method, other):
        run(each, range(1))
        each.begin_task(1)
    before = everything(method)
    for loader, message in (([(x * torch.nan, y)], "NaN"), ([], "the loader is empty")):
        with pytest.raises(fe.FisherError, match=message):
            method.prepare(loader)
        assert_same(everything(method), before)
    for call in (method.penalty, lambda: method.after_step(0, 1), lambda: method.end_task([])):
        with pytest.raises(fe.ArgumentError, match=r"call prepare\(loader\) first"):
            call()
    if kind is IEL:  # the constant of its penalty needs memory; a second call does not count samples twice
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(_composed, "ewc_penalty", Mock(side_effect=MemoryError))
            method.prepare(batches(x, y, 4))
        with pytest.raises(fe.ArgumentError, match="prepare"):
            method.penalty()
    for each in (method, other):
        each.prepare(batches(x, y, 4))
        train(each, 1)
    assert_same(everything(method), everything(other))
    with pytest.raises(fe.ArgumentError, match="task 1 has been prepared already"):
        method.prepare([(x, y)])
    with pytest.raises(fe.ArgumentError, match="compose: task 1 has not ended"):
        method.compose()
    kept = copy.deepcopy(method.model.state_dict())
    with torch.no_grad():
        method.model.fc.lora_B[0] = torch.nan
    before, drawn = everything(method), method.generator.get_state()
    with pytest.raises(fe.ArgumentError, match="end_task: fc: expected a finite task vector"):
        method.end_task([])
    assert_same(everything(method), before)
    method.generator.set_state(drawn)
    method.model.load_state_dict(kept)
    for each in (method, other):
        each.end_task([])
    assert_same(everything(method), everything(other))
    for tasks, message in (([2], "numbers of the 2 ended tasks"), ([1, 1], "expected every task once")):
        with pytest.raises(fe.ArgumentError, match=message):
            method.compose(tasks)


@pytest.mark.parametrize("structure", ["factored", "kronecker", "uniform"])
def test_other_structures(structure):
    """The penalty is the one of the structure, on the same stacked factors."""
    model = fresh()
    method = made(IEL, model, fisher=structure)
    run(method, range(2))
    method.begin_task(2)
    method.prepare([data(6, seed=2)])
    train(method, 2)
    terms = [a for layer in fe.adapters(model).values() for a in layer.composer.changes(layer)]
    values = [
        fe.functional.ewc_penalty(
            list(method.fishers.values()),
            [a.lora_a for a in terms],
            [a.lora_b * (a.scale if current else a.scale * (torch.arange(6) < 4)) for a in terms],
            ewc_lambda=3.0 * 2 / 3,
        )
        for current in (True, False)
    ]
    torch.testing.assert_close(method.penalty(), values[0] - values[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, dtype):
    """Weights of low precision have task vectors in single precision."""
    model = fresh(dtype=dtype)
    method = made(kind, model, fisher_dtype=torch.bfloat16)
    run(method, range(2))
    x, _ = data(4, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype and y.isfinite().all()
    assert {p.dtype for layer in fe.adapters(model).values() for _, p in layer.named_lora_parameters()} == {
        torch.float32
    }
    other = copy.deepcopy(model)
    assert torch.equal(other(x), y)


def test_compiles_whole():
    """The model and the penalty compile without breaks."""
    model = fresh()
    method = made(IEL, model)
    run(method, range(2))
    method.begin_task(2)
    x, y = data(4)
    method.prepare([(x, y)])

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y) + method.penalty()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), loss(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta: expected a finite number >= 0"),
        ({"beta": 1.0, "variant": "code"}, "variant: expected one of"),
        ({"beta": 1.0, "fisher": "factored", "variant": "official"}, "fisher: expected 'dense' for variant"),
        ({"beta": 1.0, "fisher_dtype": torch.float64}, "fisher_dtype: expected one of"),
        ({"beta": 1.0, "fisher": "none"}, "fisher"),
    ],
)
def test_bad_arguments(options, message):
    """Bad arguments are named and change nothing."""
    model = Tiny()
    before = snapshot(model)
    with pytest.raises(fe.EWCLoRAError, match=message):
        IEL(model, fe.LoRAConfig(r=2, target_modules=["fc"]), **options)
    assert_same(snapshot(model), before)
    assert not fe.adapters(model)


def test_foreign_refused(tmp_path):
    """Adapters of other methods are refused, and files that would lose task vectors."""
    model = adapted()
    method = made(ITA, model)
    with pytest.raises(fe.TargetError, match="qkv: expected plain adapters"):
        made(IEL, model)
    with pytest.raises(fe.CheckpointError, match=r"saved and loaded by state_dict\(\) of its method"):
        fe.save_pretrained(tmp_path, model)
    with pytest.raises(fe.ArgumentError, match="prepare: no task is running"):
        method.prepare([])
    assert float(method.penalty().detach()) == 0.0
