# SPDX-License-Identifier: Apache-2.0
"""CoDyRA against a literal transcription of its formulas, over two tasks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import Dense, close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KEYS, WIDTH, adapted, assert_same, batches, data, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import CoDyRA, codyra

LAMBDA = 5.0
EPS = torch.finfo(torch.float32).eps
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
ADAM = (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1})


def official_kappas(total: int, dense_fraction: float, kappa_max: float) -> list[float]:
    """The threshold after every iteration, as the loop of the official code finds it; 0 where it prunes
    nothing."""
    levels = [kappa_max * i / 49 for i in range(50)]
    dense = dense_fraction * total
    length = int((total - dense) // 50)
    level, found = 0, []
    for iteration in range(total):
        if length > 0 and iteration >= dense and iteration % length == 0:
            level += 1
        found.append(levels[min(49, level)] if iteration > dense else 0.0)
    return found


def linear_kappas(total: int, dense_fraction: float, kappa_max: float) -> list[float]:
    """0 until the share of done steps is dense_fraction, then along the line to (1, kappa_max)."""
    found = []
    for done in range(1, total + 1):
        share = done / total
        found.append(
            kappa_max * (share - dense_fraction) / (1 - dense_fraction) if share > dense_fraction else 0.0
        )
    return found


def shrink(gate: Tensor, kappa: float, threshold: str) -> None:
    """One gate after the other, in Python."""
    for k in range(gate.numel()):
        w = float(gate[k])
        if threshold == "soft":
            w = math.copysign(max(abs(w) - kappa, 0.0), w)
        else:
            if w > kappa:
                w = w - kappa
            if w < -kappa:
                w = w + kappa
            if abs(w) < kappa:
                w = 0.0
        gate[k] = w


def dense_penalty(dense: Dense, fishers: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for key, fisher in fishers.items():
        total = total + LAMBDA / 2 * (fisher * dense.delta(key) ** 2).sum()
    return total


def dense_fisher(dense: Dense, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """sum over parts, single samples or batches, of the squared gradient of their mean loss, each with its
    share of the samples."""
    total = {key: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for key in KEYS}
    samples = sum(len(x) for x, _ in parts)
    for x, y in parts:
        gradients = dense.weight_gradients(lambda x=x, y=y: F.cross_entropy(dense.logits(x), y))
        for key, gradient in gradients.items():
            total[key] += gradient**2 * len(x) / samples
    return total


CASES = {
    "paper": (8, SGD, {"kappa_max": 0.4}),
    "paper, Adam": (6, ADAM, {"kappa_max": 0.2, "dense_fraction": 0.3, "gate_init": "normal"}),
    "official": (
        60, (torch.optim.SGD, {"lr": 0.02}),
        {"kappa_max": 0.04, "dense_fraction": 0.1, "gate_init": "normal", "threshold": "dead_zone",
         "schedule": "staircase"},
    ),
    "with EWC": (8, SGD, {"kappa_max": 0.4, "ewc_lambda": LAMBDA}),
    "with EWC, Adam": (
        6, ADAM,
        {"kappa_max": 0.2, "gate_init": "normal", "ewc_lambda": LAMBDA, "gamma": 0.5, "fisher_mode": "batch"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_literal_two_tasks(case):
    """Two tasks are those of the literal algorithm."""
    steps, (kind, settings), options = CASES[case]
    model = adapted(r=4)
    dtype = {"fisher_dtype": torch.float64} if "ewc_lambda" in options else {}
    method = CoDyRA(model, generator=torch.Generator().manual_seed(3), **options, **dtype)
    dense, fishers = Dense(model), {}
    kappas = official_kappas if "schedule" in options else linear_kappas
    kappas = kappas(steps, options.get("dense_fraction", 0.5), options["kappa_max"])
    pruned = 0
    for task in range(2):
        x, y = data(8, seed=task)
        method.begin_task(task)
        dense.read_adapters(model)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **settings)
        leaves = [*dense.a.values(), *dense.b.values(), *dense.w.values(), *dense.head.values()]
        literal = kind(leaves, **settings)
        for step in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, steps)
            literal.zero_grad()
            (F.cross_entropy(dense.logits(x), y) + dense_penalty(dense, fishers)).backward()
            literal.step()
            with torch.no_grad():
                for gate in dense.w.values():
                    if kappas[step]:
                        shrink(gate, kappas[step], options.get("threshold", "soft"))
            if steps < 10 or step % 10 == 9:
                dense.assert_is(model)
        pruned += sum(int((gate == 0).sum()) for gate in dense.w.values())
        if "ewc_lambda" in options:
            found = dense_fisher(dense, batches(x, y, 3 if "fisher_mode" in options else 1))
            fishers = {key: options.get("gamma", 1.0) * fishers.get(key, 0.0) + found[key] for key in KEYS}
        dense.merge()
        method.end_task(batches(x, y, 3), F.cross_entropy)
        dense.read_adapters(model)
        dense.assert_is(model)
        for key, fisher in fishers.items():
            close(method.ewc.fishers[key], fisher, 1e-9, f"Fisher of {key}")
        assert all(not b.any() and a.any() for a, b in zip(dense.a.values(), dense.b.values(), strict=True))
    assert 0 < pruned < 2 * 3 * 4, "the case must prune some ranks, not all"


@given(total=st.integers(1, 200), dense_fraction=st.floats(0, 1), kappa_max=st.floats(1e-6, 1))
def test_kappa_schedule(total, dense_fraction, kappa_max):
    """Kappa is that of the reference loops."""
    for schedule, loop in (("staircase", official_kappas), ("linear", linear_kappas)):
        options = {"kappa_max": kappa_max, "dense_fraction": dense_fraction, "schedule": schedule}
        method = CoDyRA(nn.Sequential(fe.LoRALinear(2, 2, 1)), **options)
        found = [method.kappa(step, total) for step in range(total)]
        # The line is a quotient of differences, each rounded on the scale of 1 (or of total steps); it is
        # steep when few steps are left.
        slack = 8 * 2.0**-52 * kappa_max / max(1 - dense_fraction, 1 / total)
        for ours, expected in zip(found, loop(total, dense_fraction, kappa_max), strict=True):
            assert abs(ours - expected) <= slack, (schedule, ours, expected)
        assert found == sorted(found) and max(found) <= kappa_max


def test_kappa_last_step():
    """The last step has the whole of kappa."""
    method = CoDyRA(adapted(), kappa_max=0.25)
    assert [method.kappa(step, 8) for step in range(8)] == [0, 0, 0, 0, 0.0625, 0.125, 0.1875, 0.25]
    dense = CoDyRA(adapted(), kappa_max=0.25, dense_fraction=1.0)
    assert not any(dense.kappa(step, 8) for step in range(8))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.500001, 0.75, 3.0]), min_size=1), st.booleans())
def test_dead_zone(values, negative):
    """The dead zone is that of the three literal assignments."""
    gate = torch.tensor(values, dtype=torch.float64) * (-1 if negative else 1)
    expected = gate.clone()
    shrink(expected, 0.25, "dead_zone")
    codyra.dead_zone_([gate], 0.25)
    assert torch.equal(gate, expected)
    kept = [v for v in values if v == 0.25 or v >= 0.5]  # kappa itself stays, up to 2 kappa all else goes
    assert gate.count_nonzero() == len(kept)


def test_gates_one_call(monkeypatch):
    """All gates are shrunk in one call."""
    calls = []
    real = fe.functional.soft_threshold_
    monkeypatch.setattr(fe.functional, "soft_threshold_", lambda *given: calls.append(given) or real(*given))
    method = CoDyRA(adapted(), kappa_max=0.25, dense_fraction=0.0)
    method.after_step(3, 4)
    ((gates, kappa),) = calls
    assert len(gates) == len(KEYS) and kappa == 0.25
    assert all(torch.equal(gate, torch.full((2,), 0.75).double()) for gate in method.gates().values())


def test_bf16_gates():
    """Gates beside bf16 weights are fp32 and are folded in with one rounding."""
    model = adapted(dtype=torch.bfloat16)
    method = CoDyRA(model, gate_init="normal", generator=torch.Generator().manual_seed(0))
    assert {gate.dtype for gate in method.gates().values()} == {torch.float32}
    layer = model.fc
    b, w, a = (p.detach().double() for p in (layer.lora_B, layer.lora_scale, layer.lora_A))
    exact = layer.weight.double() + b @ torch.diag(w) @ a
    method.begin_task(0)
    method.end_task([])
    half = 0.5 * torch.finfo(torch.bfloat16).eps
    bound = half * exact.abs() + 8 * EPS * (1 + b.abs() @ torch.diag(w.abs()) @ a.abs())
    assert ((layer.weight.double() - exact).abs() <= bound).all()


BAD = {
    "kappa_max": -1e-3, "dense_fraction": 1.5, "gate_init": "zeros", "threshold": "hard",
    "schedule": "cosine", "ewc_lambda": -1.0, "gamma": 2.0, "fisher_mode": "mean", "labels": "none",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_values_refused(name):
    """Bad values are refused before anything is changed."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fe.ArgumentError, match=name):
        CoDyRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), **{name: BAD[name]})
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_bad_fisher_dtype():
    """A Fisher dtype that does not suit the layers leaves a plain model."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fe.DtypeError, match="fisher_dtype"):
        CoDyRA(
            model,
            fe.LoRAConfig(r=2, target_modules=["0"]),
            ewc_lambda=1.0,
            fisher_dtype=torch.float64,
        )
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_foreign_adapters_refused():
    """Adapters of another method are refused."""
    model = adapted()
    CoDyRA(model)
    before = snapshot(model)
    for method in (CoDyRA, fe.methods.InfLoRA):
        with pytest.raises(fe.TargetError, match="another method"):
            method(model)
    assert_same(before, snapshot(model))
    scaled = adapted()
    scaled.fc.lora_scale = nn.Parameter(torch.ones(2).double())
    with pytest.raises(fe.TargetError, match="lora_scale"):
        CoDyRA(scaled)
    assert scaled.qkv.composer is None and "lora_scale_k" not in dict(scaled.qkv.named_parameters())


def test_zero_steps_are_refused():
    with pytest.raises(fe.ArgumentError, match="total_steps"):
        CoDyRA(adapted()).after_step(0, 0)


def test_compile_one_graph():
    """Compiled models are one graph, with and without ranks."""
    model = adapted(dtype=torch.float32)
    method = CoDyRA(model)
    method.begin_task(0)
    x, y = data(4, dtype=torch.float32)
    with torch.no_grad():
        method.gates()["qkv.k"][0] = 0.0
        method.gates()["fc"].zero_()
    method.compact_()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model.qkv.lora_scale_k)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = torch.autograd.grad(F.cross_entropy(compiled(x), y), model.qkv.lora_scale_k)
    assert torch.equal(found[0], expected[0])


def test_gates_saved(tmp_path):
    """Gates and Fishers are in the files."""
    method, other = (CoDyRA(adapted(seed=s), ewc_lambda=1.0, gate_init="normal") for s in (0, 0))
    method.begin_task(0)
    method.end_task([data(4)], F.cross_entropy)
    fe.save_pretrained(tmp_path / "task0", method.model, method.ewc)
    fe.load_pretrained(tmp_path / "task0", other.model, other.ewc)
    assert_same(snapshot(method.model, method.ewc.fishers), snapshot(other.model, other.ewc.fishers))
