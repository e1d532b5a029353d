# SPDX-License-Identifier: Apache-2.0
"""CL-LoRA against a literal transcription, over three tasks, and its models of each task."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import Dense, close
from tiny_models import KEYS, Tiny, adapted, assert_same, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import CLLoRA

OPTIONS = {"shared": ["qkv"], "orthogonality": 0.3}  # more than is published, so that an error would show


def attention(qkv: Tensor, x: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return x + F.scaled_dot_product_attention(q, k, v)


def early_exit(model: Tiny, shared: str = "qkv"):
    """The shared layer alone, and the head."""

    def run(x: Tensor) -> Tensor:
        y = attention(model.qkv(x), x) if shared == "qkv" else x + torch.tanh(model.fc(x))
        return model.head(y.mean(1))

    return run


class Literal(Dense):
    """The algorithm with explicit weights: `b` of shared adapters goes on, `old` is that of the last task."""

    def __init__(self, model: nn.Module, shared: str) -> None:
        super().__init__(model)
        self.layer = shared
        self.shared = [key for key in KEYS if key.startswith(shared)]
        self.specific = [key for key in KEYS if key not in self.shared]
        self.old: dict[str, Tensor] = {}
        self.past: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def delta(self, key: str) -> Tensor:
        return self.w.get(key, 1.0) * (self.b[key] @ self.a[key])

    def of_exit(self, x: Tensor, b: dict[str, Tensor]) -> Tensor:
        """The logits of the early exit, with these B in the place of the shared ones."""
        changes = [b[key] @ self.a[key] for key in self.shared]
        if self.layer == "qkv":
            changes = [torch.zeros_like(changes[0]), *changes]  # of q
        y = x @ (self.weights[self.layer] + torch.cat(changes)).T + self.constant[f"{self.layer}.bias"]
        y = attention(y, x) if self.layer == "qkv" else x + torch.tanh(y)
        return y.mean(1) @ self.head["head.weight"].T + self.head["head.bias"]

    def distill(self, x: Tensor, detached: bool) -> None:
        """Gradients of the distillation, reassigned."""
        student, teacher = self.of_exit(x, self.b), self.of_exit(x, self.old)
        teacher = teacher.detach() if detached else teacher
        log_p, p = torch.log_softmax(student / 2, 1), torch.softmax(teacher / 2, 1)
        (5 * -(p * log_p).sum() / len(x)).backward()
        for key in self.shared:
            norms = torch.stack([row.norm() for row in self.old[key]])
            self.b[key].grad *= (len(norms) * norms / norms.sum())[:, None]

    def orthogonality(self) -> Tensor:
        """The mean cosine of all block weights with those of earlier tasks."""
        total = torch.zeros((), dtype=torch.float64)
        now = torch.stack([self.w[key] for key in self.specific])
        for task in self.past:
            old = torch.stack([w for _, _, w in task])
            total = total + (old / (old.norm() + 1e-8) * now / (now.norm() + 1e-8)).sum().abs()
        return total / max(len(self.past), 1)

    def _now(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(self.a[key], self.b[key], self.w[key]) for key in self.specific]

    def end(self) -> None:
        self.past.append([tuple(t.detach().clone() for t in now) for now in self._now()])
        self.old = {key: self.b[key].detach().clone() for key in self.shared}

    def model_of(self, task: int, x: Tensor) -> Tensor:
        """The logits of a task that has ended."""
        held = self._now()
        for tensors, keep in ((self.past[task], False), (held, True)):
            for key, (a, b, w) in zip(self.specific, tensors, strict=True):
                self.a[key], self.b[key], self.w[key] = a, b, w
            if not keep:
                found = self.logits(x).detach()
        return found


def optimizer_of(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.5, weight_decay=0.01)


@pytest.mark.parametrize(
    ("shared", "variant", "steps"), [("qkv", "paper", 1), ("qkv", "official", 2), ("fc", "paper", 2)]
)
def test_literal_three_tasks(shared, variant, steps):
    """Three tasks are those of the literal algorithm, with one step or two per batch, and so are the models
    of all tasks after each."""
    model = fresh()
    method = CLLoRA(model, variant=variant, **{**OPTIONS, "shared": [shared]})
    dense = Literal(model, shared)
    for task in range(3):
        method.begin_task(task)
        going_on = {key: dense.b[key] for key in dense.shared} if task else {}
        dense.read_adapters(model)
        dense.b |= going_on
        for key in dense.shared:
            dense.a[key].requires_grad_(False)
        trained = [t for table in (dense.a, dense.b, dense.w, dense.head) for t in table.values()]
        literal = optimizer_of([t for t in trained if t.requires_grad])
        optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
        for step in range(3):
            x, y = data(6, seed=10 * task + step)
            optimizer.zero_grad()
            literal.zero_grad()
            if task:
                loss = method.distillation(x, early_exit(model, shared))
                loss.backward()
                method.reassign_()
                dense.distill(x, detached=variant == "paper")
                if steps == 2:
                    for each in (optimizer, literal):
                        each.step()
                        each.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            (F.cross_entropy(dense.logits(x), y) + 0.3 * dense.orthogonality()).backward()
            optimizer.step()
            literal.step()
            method.after_step(step, 3)
            dense.assert_is(model)
        dense.end()
        method.end_task([])
        x = data(5, seed=99)[0]
        for k in range(task + 1):
            with method.task(k):
                close(model(x), dense.model_of(k, x), 1e-9, f"model of task {k}")
        close(model(x), dense.model_of(task, x), 1e-9, "between tasks the model is that of the last")
    outputs = [dense.model_of(k, x) for k in range(3)]
    assert min(float((a - b).abs().max()) for a in outputs for b in outputs if a is not b) > 1e-3
    with pytest.raises(fe.ArgumentError, match="no single plain model"):
        method.export()
    for k in range(3):
        plain = copy.deepcopy(method).export(k)
        assert type(plain.fc) is nn.Linear and type(plain.qkv) is nn.Linear
        close(plain(x), outputs[k], 1e-9, f"exported model of task {k}")


def test_start():
    """Rows of A are orthonormal and those of shared layers frozen; block weights are from 0.5 to 1.5."""
    model = fresh()
    method = CLLoRA(model, shared="qkv", generator=torch.Generator().manual_seed(5))
    found = []
    for task in range(2):
        method.begin_task(task)
        for a in (model.qkv.lora_A_k, model.qkv.lora_A_v, model.fc.lora_A):
            close(a @ a.T, torch.eye(2).double(), 1e-12, "rows of A")
        found.append([p.detach().clone() for p in (model.qkv.lora_A_k, model.fc.lora_A, model.fc.lora_scale)])
        assert 0.5 <= float(model.fc.lora_scale.detach()) <= 1.5
        assert not model.fc.lora_B.any()
        method.end_task([])
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert same == [True, False, False]
    names = {"qkv.lora_B_k", "qkv.lora_B_v", "fc.lora_A", "fc.lora_B", "fc.lora_scale"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == names | {"head.weight", "head.bias"}
    assert method.report().summary == {"shared": 2, "specific": 1}
    weights = method.report().rows[2]["weights"]
    assert weights == tuple(float(scales[2]) for scales in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """A task in lower precision: everything that is trained moves, and the model of a task is kept."""
    model = fresh(dtype=dtype)
    method = CLLoRA(model, **OPTIONS)
    for task in range(2):
        method.begin_task(task)
        optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
        x, y = data(6, seed=task, dtype=dtype)
        for step in range(2):
            optimizer.zero_grad()
            if task:
                method.distillation(x, early_exit(model)).backward()
                method.reassign_()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, 2)
        before = model(x)
        method.end_task([])
        assert torch.equal(model(x), before) and torch.isfinite(before).all()
    assert method.block_weights()["fc"].dtype == torch.float32


def ran(method: CLLoRA) -> None:
    task, model = method.tasks, method.model
    method.begin_task(task)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        x, y = data(6, seed=10 * task + step)
        optimizer.zero_grad()
        if task:
            method.distillation(x, early_exit(model)).backward()
            method.reassign_()
        (F.cross_entropy(model(x), y) + method.penalty()).backward()
        optimizer.step()
        method.after_step(step, 2)
    method.end_task([])


@pytest.mark.parametrize("after", [0, 2])
def test_resume_fresh_model(after, tmp_path):
    """A saved state goes on in a fresh model, bit for bit."""
    method = CLLoRA(fresh(), **OPTIONS)
    for _ in range(after):
        ran(method)
    torch.save([method.state_dict(), method.model.state_dict()], tmp_path / "state.pt")
    state, model_state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = CLLoRA(fresh(seed=8), **OPTIONS)
    other.load_state_dict(state)
    other.model.load_state_dict(model_state)
    x = data(4)[0]
    assert other.tasks == after and torch.equal(other.model(x), method.model(x))
    for each in (method, other):
        torch.manual_seed(4)
        ran(each)
    assert_same(snapshot(method.model), snapshot(other.model))
    wrong = [
        ({**state, "config": {**state["config"], "shared": ["fc"]}}, "shared"),
        ({**state, "tensors": {}}, "qkv.k.lora_A"),
        ({**state, "tensors": {**state["tensors"], "fc.lora_past_scale": torch.ones(7)}}, r"shape \[\d\]"),
    ]
    before = snapshot(other.model)
    for saved, message in wrong:
        with pytest.raises(fe.CheckpointError, match=message):
            other.load_state_dict(saved)
        assert_same(before, snapshot(other.model))


def test_refused(tmp_path):
    """Bad values and wrong orders are refused before anything is changed."""
    bad = [{"shared": "nothing"}, {"shared": 3}, {"shared": None}, {"kd_weight": -1.0}, {"temperature": 0.0},
           {"orthogonality": float("nan")}, {"variant": "mine"}]  # fmt: skip
    for options in bad:
        model = Tiny()
        with pytest.raises(fe.EWCLoRAError, match=next(iter(options))):
            CLLoRA(model, fe.LoRAConfig(r=2, target_modules=["qkv", "fc"]), **{"shared": "qkv", **options})
        assert type(model.fc) is nn.Linear and model.fc.weight.requires_grad
    with pytest.raises(fe.ArgumentError, match="r: expected at most the 6"):
        CLLoRA(Tiny(), fe.LoRAConfig(r=7, target_modules=["qkv", "fc"]), shared="qkv")
    with pytest.raises(fe.ArgumentError, match="lora_B of 0"):
        CLLoRA(adapted(), shared="qkv")
    method = CLLoRA(fresh(), **OPTIONS)
    exit_ = early_exit(method.model)
    x, _ = data(6)
    with pytest.raises(fe.ArgumentError, match="begin_task"):
        method.distillation(x, exit_)
    method.begin_task(0)
    assert method.distillation(x, exit_).item() == method.penalty().item() == 0.0
    with pytest.raises(fe.ArgumentError, match="expected gradients of a distillation"):
        method.reassign_()
    method.end_task([])
    method.begin_task(1)
    for task in (2, -1, True):
        with pytest.raises(fe.ArgumentError, match="2 tasks so far"), method.task(task):
            pass
    with pytest.raises(fe.ArgumentError, match="logits"):
        method.distillation(x, lambda x: exit_(x).sum())
    loss = method.distillation(x, exit_)
    with pytest.raises(fe.ArgumentError, match="expected reassign_"):
        method.after_step(0, 1)
    with pytest.raises(fe.ArgumentError, match=r"qkv.k: the gradient of the distillation did not reach"):
        method.reassign_()
    loss.backward()
    method.reassign_()
    method.model.zero_grad()
    with torch.no_grad():
        method.model.fc.lora_scale.fill_(torch.nan)
    before = snapshot(method.model)
    with pytest.raises(fe.ArgumentError, match="block weight of fc: expected finite"):
        method.end_task([])
    assert_same(before, snapshot(method.model))
    with torch.no_grad():
        method.model.fc.lora_scale.fill_(1.0)
    fe.merge(method.model)
    for call in (lambda: method.task(0).__enter__(), lambda: method.end_task([])):
        with pytest.raises(fe.TargetError, match="merged"):
            call()
    fe.unmerge(method.model)
    with pytest.raises(fe.TargetError, match="another method"):
        CLLoRA(method.model, shared="qkv")
    with pytest.raises(fe.CheckpointError, match=r"state_dict\(\) of CLLoRA"):
        fe.save_pretrained(tmp_path / "saved", method.model)
