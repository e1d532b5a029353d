# SPDX-License-Identifier: Apache-2.0
"""InfLoRA against a literal transcription, over three tasks, and what its subspaces promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import ROWS, Dense, close
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import WIDTH, Tiny, batches, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import InfLoRA
from fused_ewclora.methods._subspace import Subspace, directions, extended

LAYERS = ("qkv", "fc")


class Literal(Dense):
    """The paper's or the official algorithm with dense projections, and the memory as columns of M."""

    def __init__(self, model: nn.Module, variant: str) -> None:
        super().__init__(model)
        self.variant = variant
        self.memory = {name: torch.zeros(WIDTH, 0, dtype=torch.float64) for name in LAYERS}

    def covariance(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """sum over samples and tokens of the outer products of inputs of each layer."""
        model = Tiny().double()
        weights = {f"{name}.weight": self.weight(name).detach() for name in LAYERS}
        model.load_state_dict({**weights, **self.constant, **self.head})
        total = {name: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for name in LAYERS}
        for name in LAYERS:
            for n in range(len(x)):
                seen = []
                hook = getattr(model, name).register_forward_hook(lambda _m, args, _y: seen.append(args[0]))  # noqa: B023
                model(x[n : n + 1])
                hook.remove()
                for row in seen[0][0]:
                    total[name] += torch.outer(row.detach(), row.detach())
        return total

    def choose(self, c: Tensor, name: str, rank: int) -> Tensor:
        """A of a task; rows without energy, which are any direction at all in a literal run, are 0."""
        m = self.memory[name]
        projector = torch.eye(WIDTH, dtype=torch.float64) - m @ m.T
        if self.variant == "paper":
            inputs = torch.linalg.cholesky(c).T  # any H with H^T H = C has the same right singular vectors
            _, values, vh = torch.linalg.svd(inputs @ projector)
        else:
            u, values, _ = torch.linalg.svd(c - m @ m.T @ c)
            vh = u.T / 3**0.5
        return vh[:rank] * (values[:rank] > 1e-9)[:, None]

    def remember(self, c: Tensor, name: str, epsilon: float) -> None:
        """The memory after a task."""
        m = self.memory[name]
        if self.variant == "paper":
            inputs = torch.linalg.cholesky(c).T
            total = float((inputs**2).sum())
            projected = inputs - inputs @ m @ m.T
            _, values, vh = torch.linalg.svd(projected)
            new = vh.T
        else:
            total = float((torch.linalg.svdvals(c) ** 2).sum())
            projected = c - m @ m.T @ c
            new, values, _ = torch.linalg.svd(projected)
        share = (total - float((values**2).sum())) / total
        if self.variant == "official" and m.shape[1] == 0:
            count = max(int(((values**2 / total).cumsum(0) < epsilon).sum()), 1)
        else:
            count = 0
            while share < epsilon and count < WIDTH - m.shape[1]:
                share += float(values[count] ** 2) / total
                count += 1
        self.memory[name] = torch.cat([m, new[:, :count]], 1)


def projector(subspace: Subspace) -> Tensor:
    p = subspace.basis @ subspace.basis.T
    return torch.eye(WIDTH, dtype=torch.float64) - p if subspace.complement else p


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("epsilon", "last", "total"), [(0.6, 1.0, 5), (0.9, 1.0, 4), (0.7, 0.7, None)])
def test_literal_three_tasks(variant, epsilon, last, total):
    """Three tasks are those of the literal algorithm."""
    model = fresh()
    method = InfLoRA(model, epsilon=epsilon, epsilon_last=last, total_tasks=total, variant=variant)
    dense = Literal(model, variant)
    ranks = []
    for task in range(3):
        x, y = data(8, seed=task)
        method.begin_task(task)
        for b in dense.b.values():
            b.data.zero_()
        expected = {name: dense.choose(c, name, 2) for name, c in dense.covariance(x, y).items()}
        method.prepare(batches(x, y, 3))
        parameters = dict(model.named_parameters())
        for key, (name, _) in ROWS.items():
            lora_a = parameters[f"{name}.lora_A" + key.replace(".", "_")[len(name) :]]
            close(lora_a.T @ lora_a, expected[name].T @ expected[name], 1e-9, f"A of {key}")
            dense.a[key] = lora_a.detach().clone()  # of two signs per row either is right
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        literal = torch.optim.Adam([*dense.b.values(), *dense.head.values()], lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, 3)
            literal.zero_grad()
            F.cross_entropy(dense.logits(x), y).backward()
            literal.step()
            dense.assert_is(model)
        threshold = epsilon if total is None else (last - epsilon) * task / total + epsilon
        for name, c in dense.covariance(x, y).items():
            dense.remember(c, name, threshold)
        dense.merge()
        method.end_task(batches(x, y, 3), F.cross_entropy)
        for name, used in method.subspaces.items():
            memory = dense.memory[name]
            close(projector(used), memory @ memory.T, 1e-9, f"subspace of {name}")
            assert used.rank == memory.shape[1] and used.basis.shape[1] <= WIDTH / 2
            ranks.append(used.rank)
        for b in dense.b.values():
            b.data.zero_()
        dense.assert_is(model)
    assert 0 < min(ranks) < max(ranks), "the case must extend the subspace"


def test_only_b_trained():
    """Only B is trained, and k and v share A."""
    model = fresh()
    method = InfLoRA(model)
    method.begin_task(0)
    x, y = data(6)
    method.prepare([(x, y)])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"qkv.lora_B_k", "qkv.lora_B_v", "fc.lora_B", "head.weight", "head.bias"}
    assert torch.equal(model.qkv.lora_A_k, model.qkv.lora_A_v)
    F.cross_entropy(model(x), y).backward()
    assert model.qkv.lora_A_k.grad is None and model.qkv.lora_B_k.grad.any()
    close(model.qkv.lora_A_k @ model.qkv.lora_A_k.T, torch.eye(2).double(), 1e-12, "rows of A")


def test_subspace_protected():
    """With epsilon 1 the inputs of the first task of a layer span its subspace: later updates are 0 on it."""
    model = nn.Sequential(nn.Linear(WIDTH, 4, bias=False)).double()
    method = InfLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), epsilon=1.0)
    old = torch.randn(9, 2).double() @ torch.randn(2, WIDTH).double()  # of rank 2
    for task, x in enumerate((old, torch.randn(9, WIDTH).double())):
        method.begin_task(task)
        method.prepare([x])
        with torch.no_grad():
            model[0].lora_B.normal_()
        before, new = model(old), model(x)
        method.end_task([x])
        close(model(x), new, 1e-12, "what the task learned")
        assert method.subspaces["0"].rank == (2, WIDTH)[task]
    close(model(old), before, 1e-12, "old inputs")
    method.begin_task(2)
    method.prepare([x])
    assert not model[0].lora_A.any()  # no direction is left


@given(
    width=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 14)),
    epsilon=st.floats(0, 1),
    variant=st.sampled_from(["paper", "official"]),
    seed=st.integers(0, 99),
)
def test_subspace_orthonormal(width, shape, epsilon, variant, seed):
    """Subspaces hold their share, with orthonormal bases of at most half the width."""
    generator = torch.Generator().manual_seed(seed)
    used = Subspace.empty(width, torch.device("cpu"))
    for _ in range(3):
        x = torch.randn(shape[0], width, dtype=torch.float64, generator=generator)
        c = x.T @ x
        rows = directions(c, used, shape[1], variant)
        free = used.free()
        assert rows.shape == (shape[1], width) and free.shape == (width, width - used.rank)
        assert (rows.max(1).values >= -rows.min(1).values).all(), "one of two signs, the same everywhere"
        inside = rows @ free @ free.T
        close(inside, rows, 1e-12, "directions outside of what is used")
        count = min(shape[1], width - used.rank)
        norm = 1.0 if variant == "paper" else 1 / 3
        close(rows @ rows.T, norm * torch.diag((torch.arange(shape[1]) < count).double()), 1e-12, "rows")
        after = extended(used, c, epsilon, variant)
        basis = after.basis
        close(basis.T @ basis, torch.eye(basis.shape[1]).double(), 1e-12, "basis")
        assert basis.shape[1] <= width / 2 and after.rank >= used.rank
        left = after.free()
        energy = (x @ left).square().sum() / x.square().sum()
        if variant == "official":
            energy = (left.T @ c).square().sum() / c.square().sum()
        if variant == "paper" or used.rank:
            assert energy <= max(1 - epsilon, 0) + 1e-9
        used = after


def test_inputs_counted_once():
    """bf16 inputs have exact products in fp32."""
    found = []
    for size in (1, 4, 9):
        method = InfLoRA(fresh(dtype=torch.bfloat16))
        method.begin_task(0)
        x, y = data(9, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(method._covariances(batches(x, y, size))["qkv"])
    exact = sum(torch.outer(row, row) for row in x.double().flatten(0, 1))
    for c in found:
        assert c.dtype == torch.float64
        close(c, exact, 27 * float(torch.finfo(torch.float32).eps) * float(exact.abs().max()), "C")


def test_passes_leave_model():
    """Passes leave modes, hooks and gradients alone."""
    model = fresh()
    model.train()
    model.fc.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    method = InfLoRA(model)
    method.begin_task(0)
    seen = []
    model.head.register_forward_pre_hook(lambda module, _args: seen.append(module.training))
    method.prepare(batches(*data(4), 2))
    assert seen == [False, False] and model.training and not model.fc.training
    assert not model.fc._forward_pre_hooks and model.head.weight.grad.all()


def test_batch_forms():
    """Loaders of mappings and of batches of other forms are served."""
    x, y = data(6)
    found = []
    for loader, options in (
        ([(x, y)], {}),
        ([{"x": x}], {}),
        ([(x, y, None)], {"forward": lambda model, batch: (model(batch[0]), None)}),
        ([x, x * torch.nan], {"max_batches": 1}),
    ):
        method = InfLoRA(fresh(), **options)
        method.begin_task(0)
        method.prepare(loader)
        found.append(method.model.fc.lora_A.detach().clone())
        method.end_task(loader)
    assert all(torch.equal(a, found[0]) for a in found)


def test_prepare_optional():
    """One loop serves methods that prepare and methods that do not."""
    for kind in (InfLoRA, fe.methods.CoDyRA, fe.methods.LoRA):
        method = kind(fresh())
        method.begin_task(0)
        before = snapshot(method.model)
        method.prepare([data(4)])
        changed = [k for k, v in snapshot(method.model).items() if not torch.equal(v, before[k])]
        assert all("lora_A" in name for name in changed) and bool(changed) == (kind is InfLoRA)
