# SPDX-License-Identifier: Apache-2.0
"""CoDyRA's ranks: removed together with the optimizer's state, gone altogether, and back at the next task."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import close
from hypothesis import given
from hypothesis import strategies as st
from models import explicit_delta
from tiny_models import KEYS, WIDTH, adapted, assert_same, batches, data, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import CoDyRA

DEAD = {"qkv.k": [1], "qkv.v": [], "fc": [0, 2]}  # gates that are 0, of 3
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "foreach": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
}


def gated(seed: int = 5, **options) -> CoDyRA:
    generator = torch.Generator().manual_seed(seed)
    method = CoDyRA(adapted(r=3), kappa_max=0.0, generator=generator, **options)
    method.begin_task(0)
    return method


@torch.no_grad()
def kill(method: CoDyRA, dead: dict[str, list[int]] = DEAD) -> None:
    for key, ranks in dead.items():
        method.gates()[key][ranks] = 0.0


def step(method: CoDyRA, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = data(8, seed=seed)
    optimizer.zero_grad()
    (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
    optimizer.step()


def make(name: str, method: CoDyRA) -> torch.optim.Optimizer:
    kind, options = OPTIMIZERS[name]
    head = list(method.model.head.parameters())
    others = [p for p in method.model.parameters() if p.requires_grad and all(p is not q for q in head)]
    return kind([{"params": others}, {"params": head, "lr": 0.01}], **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compaction_matches_zeros(name):
    """Sums over ranks have fewer terms, all of them zeros: a few roundings of fp64 in four steps."""
    method = gated()
    optimizer = make(name, method)
    for seed in range(2):
        step(method, optimizer, seed)
    kill(method)
    twin, theirs = copy.deepcopy((method, optimizer))
    x, _ = data(4)
    before = method.model(x)
    assert method.compact_(optimizer) == 3
    torch.testing.assert_close(method.model(x), before, rtol=1e-14, atol=1e-15)
    for seed in range(4):
        step(method, optimizer, seed)
        step(twin, theirs, seed)
        kill(twin)
    for key, gate in method.gates().items():
        kept = [k for k in range(3) if k not in DEAD[key]]
        close(gate, twin.gates()[key][kept], 1e-12, key)
    close(method.model.fc.lora_A, twin.model.fc.lora_A[1:2], 1e-12, "A of fc")
    close(method.model.fc.lora_B, twin.model.fc.lora_B[:, 1:2], 1e-12, "B of fc")
    close(method.model.head.weight, twin.model.head.weight, 1e-12, "head")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in method.model.parameters() if p.requires_grad}
    assert set(optimizer.state) <= {p for group in optimizer.param_groups for p in group["params"]}


def test_gradients_compacted():
    """Gradients are cut too, and frozen factors stay frozen."""
    method = gated()
    method.model.fc.lora_A.requires_grad_(False)
    x, y = data(8)
    F.cross_entropy(method.model(x), y).backward()
    kill(method)
    expected = method.model.fc.lora_B.grad[:, 1:2].clone()
    method.compact_()
    assert torch.equal(method.model.fc.lora_B.grad, expected)
    assert method.model.fc.lora_A.shape == (1, WIDTH) and not method.model.fc.lora_A.requires_grad


def test_nothing_happens_without_zeros():
    method = gated()
    before = list(method.model.parameters())
    assert method.compact_(make("SGD", method)) == 0
    assert all(a is b for a, b in zip(method.model.parameters(), before, strict=True))


def adafactor(method):
    return torch.optim.Adafactor(method.model.parameters())


def lbfgs(method):
    return torch.optim.LBFGS(method.model.parameters())


def of_the_head(method):
    return torch.optim.SGD(method.model.head.parameters(), lr=0.1)


@pytest.mark.parametrize("maker", [adafactor, lbfgs, of_the_head])
def test_bad_optimizer_refused(maker):
    """Optimizers that cannot follow are refused before anything is changed."""
    method = gated()
    optimizer = maker(method)
    if maker is adafactor:
        step(method, optimizer, 0)
    kill(method)
    before, state = snapshot(method.model), str(optimizer.state_dict())
    with pytest.raises(fe.ArgumentError, match="optimizer"):
        method.compact_(optimizer)
    assert_same(before, snapshot(method.model))
    assert str(optimizer.state_dict()) == state


def test_merged_layers_are_refused():
    method = gated()
    fe.merge(method.model)
    with pytest.raises(fe.TargetError, match="unmerge"):
        method.compact_()


@pytest.mark.parametrize("where", [KEYS, ("fc",), ("qkv.k", "qkv.v"), ("qkv.v",)])
def test_zero_rank_adapters(where):
    """Adapters without ranks run, merge and come back."""
    method = gated()
    model = method.model
    kill(method, {key: [0, 1, 2] for key in where})
    x, y = data(8)
    before = model(x)
    kept = {key: 0 if key in where else 3 for key in KEYS}
    weight = model.fc.consolidated_weight()
    assert method.compact_() == 3 * len(where)
    assert method.survivors() == kept
    torch.testing.assert_close(model(x), before, rtol=1e-14, atol=1e-15)
    fe.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)
    fe.unmerge(model)
    F.cross_entropy(model(x), y).backward()
    method.after_step(0, 1)
    method.end_task([])
    torch.testing.assert_close(model.fc.weight, weight, rtol=1e-14, atol=1e-15)
    method.begin_task(1)
    assert method.survivors() == dict.fromkeys(KEYS, 3)
    assert model.fc.lora_A.shape == (3, WIDTH) and model.fc.lora_A.any()
    optimizer = make("SGD", method)
    step(method, optimizer, 0)
    assert model.fc.lora_B.any() and model.qkv.lora_B_v.any()


def test_zero_rank_fisher():
    """The Fisher of a layer without ranks is that of its weights."""
    fishers = []
    for compact in (False, True):
        method = gated(ewc_lambda=2.0, fisher_dtype=torch.float64)
        kill(method, {key: [0, 1, 2] for key in KEYS})
        if compact:
            method.compact_()
        method.ewc.estimate_fisher(batches(*data(6), 3), F.cross_entropy)
        tensors = method.ewc.state_dict()["tensors"]
        fishers.append({key: tensors[f"task.{key}"] for key in KEYS})
    for key in KEYS:
        assert fishers[0][key].any()
        torch.testing.assert_close(fishers[1][key], fishers[0][key], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 2.0, "fisher_dtype": torch.float64}])
def test_next_task_independent(options):
    """The next task does not depend on compaction."""
    found = []
    for compact in (False, True):
        method = gated(gate_init="normal", **options)
        kill(method)
        if compact:
            method.compact_()
        method.end_task(batches(*data(6), 3), F.cross_entropy)
        found.append(snapshot(method.model))
    for name, tensor in found[0].items():
        close(found[1][name], tensor, 1e-13, name)
        if "lora" in name:
            assert torch.equal(found[1][name], tensor), name


@given(
    heads=st.sampled_from([None, 1, 2]),
    names=st.sets(st.sampled_from(["q", "k", "v"]), min_size=1),
    gates=st.lists(st.sampled_from([0.0, -0.5, 2.0]), min_size=1, max_size=5),
    turn=st.integers(0, 4),
)
def test_compaction_any_slices(heads, names, gates, turn):
    """Compaction keeps what the layer computes, for any slices."""
    layout = fe.QKVLayout(("q", "k", "v"), interleave=heads)
    model = nn.Sequential(nn.Linear(5, 12)).double()
    config = fe.LoRAConfig(
        r=len(gates), lora_alpha=3, target_modules=["0"], slices=sorted(names), layout=layout
    )
    method = CoDyRA(model, config)
    method.begin_task(0)
    with torch.no_grad():
        for i, gate in enumerate(method.gates().values()):
            gate.copy_(torch.tensor(gates[(turn + i) % len(gates) :] + gates[: (turn + i) % len(gates)]))
        for _, _, lora_b in model[0].adapter_parameters():
            lora_b.normal_()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    before = model(x)
    exact = F.linear(x, model[0].weight + explicit_delta(model[0]), model[0].bias)
    torch.testing.assert_close(before, exact, rtol=1e-13, atol=1e-13)
    (slope,) = torch.autograd.grad(before.sum(), x)
    zeros = gates.count(0.0) * len(names)
    assert method.compact_() == zeros
    after = model(x)
    torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(after.sum(), x)[0], slope, rtol=1e-13, atol=1e-13)
    assert sum(method.survivors().values()) == len(gates) * len(names) - zeros
    method.end_task([])
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-13)


def test_reports_list_ranks():
    """Reports have the ranks of every task."""
    method = gated()
    kill(method)
    method.compact_()
    method.end_task([])
    method.begin_task(1)
    kill(method, {"qkv.v": [0, 1, 2]})
    report = method.report()
    assert [row["adapter"] for row in report.rows] == list(KEYS)
    assert [(row["r"], row["task 0"], row["now"]) for row in report.rows] == [(3, 2, 3), (3, 3, 0), (3, 1, 3)]
    assert report.summary == {"r": 9, "tasks": [6], "now": 6}
    assert "task 0" in str(report)


def everything(method: CoDyRA) -> dict[str, Tensor]:
    return snapshot(method.model, {} if method.ewc is None else method.ewc.state_dict()["tensors"])


@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 2.0, "fisher_dtype": torch.float64}])
def test_failed_task_retry(options):
    """A task that cannot end changes nothing and can be ended again."""
    method = gated(**options)
    twin = gated(**options)
    loader = batches(*data(6), 3)
    for each in (method, twin):
        kill(each)
        each.compact_()
    with torch.no_grad():
        held = method.model.qkv.weight[0, 0].clone()
        method.model.qkv.weight[0, 0] = torch.inf  # cannot be merged
    before, parameters = everything(method), list(method.model.parameters())
    with pytest.raises(fe.EWCLoRAError):
        method.end_task(loader, F.cross_entropy)
    assert_same(before, everything(method))
    assert all(a is b for a, b in zip(method.model.parameters(), parameters, strict=True))
    assert method.tasks == 0 and method.report().summary["tasks"] == []
    with torch.no_grad():
        method.model.qkv.weight[0, 0] = held
    for each in (method, twin):
        each.generator.manual_seed(1)
        if each.ewc is not None:
            each.ewc.generator.manual_seed(1)
        each.end_task(loader, F.cross_entropy)
    assert_same(everything(twin), everything(method))


def test_failed_fisher_counted_once(monkeypatch):
    """An attempt that fails after its Fisher does not count twice."""
    method, twin = (gated(ewc_lambda=2.0, fisher_dtype=torch.float64) for _ in range(2))
    loader = batches(*data(6), 3)
    with monkeypatch.context() as patch:
        patch.setattr(fe.EWC, "consolidate", lambda *_: (_ for _ in ()).throw(RuntimeError("interrupted")))
        with pytest.raises(RuntimeError, match="interrupted"):
            method.end_task(loader, F.cross_entropy)
    for each in (method, twin):
        each.generator.manual_seed(1)
        each.end_task(loader, F.cross_entropy)
    assert_same(everything(twin), everything(method))
    assert [record.samples for record in method.ewc.history] == [6]


@pytest.mark.parametrize("options", [{}, {"ewc_lambda": 2.0, "fisher_dtype": torch.float64}])
def test_resume_fresh_model(options, tmp_path):
    """A saved state goes on in a fresh model."""

    def task(method: CoDyRA) -> None:
        seed = method.tasks
        method.begin_task(seed)
        optimizer = make("Adam", method)
        for _ in range(2):
            step(method, optimizer, seed)
        kill(method)
        method.compact_(optimizer)
        method.generator.manual_seed(seed)
        method.end_task(batches(*data(6, seed=seed), 3), F.cross_entropy)

    method = gated(**options)
    method.end_task(batches(*data(6), 3), F.cross_entropy)
    task(method)
    torch.save([method.model.state_dict(), method.state_dict()], tmp_path / "state.pt")
    model_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
    generator = torch.Generator().manual_seed(9)
    other = CoDyRA(adapted(seed=8, r=3), kappa_max=0.0, generator=generator, **options)
    other.model.load_state_dict(model_state)
    other.load_state_dict(state)
    assert other.tasks == 2 and other.model.fc.consolidated_tasks == 2
    task(method)
    task(other)
    assert_same(everything(method), everything(other))
    assert method.report().rows == other.report().rows


def test_bad_state_refused():
    """States that do not fit are refused."""
    method = gated()
    with pytest.raises(fe.ArgumentError, match="has not ended"):
        method.state_dict()
    method.end_task([])
    state = method.state_dict()
    other = CoDyRA(adapted(r=3))
    wrong = [
        (None, "expected the dictionary"),
        ({**state, "config": {**state["config"], "method": "InfLoRA"}}, "method"),
        ({**state, "config": {**state["config"], "format": 7}}, "format"),
        ({**state, "config": {**state["config"], "tasks": True}}, "tasks"),
        ({**state, "config": {**state["config"], "tasks": 2}}, "survivors"),
        ({**state, "config": {**state["config"], "layers": {"fc": 1}}}, "layers"),
        ({**state, "config": {**state["config"], "survivors": [{"fc": 1}]}}, "survivors"),
        ({**state, "config": {**state["config"], "ewc": {}}}, "EWC penalty"),
    ]
    for saved, message in wrong:
        with pytest.raises(fe.CheckpointError, match=message):
            other.load_state_dict(saved)
        assert other.tasks == 0 and other.report().summary["tasks"] == []
    other.load_state_dict(state)
    assert other.tasks == 1
