# SPDX-License-Identifier: Apache-2.0
"""KeepLoRA against a literal transcription, over three tasks, and what its subspaces promise."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from dense_tiny import ROWS, Dense, close
from tiny_models import KEYS, WIDTH, Tiny, adapted, assert_same, batches, data, fresh, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import KeepLoRA
from fused_ewclora.methods._subspace import Subspace

WIDE = torch.float64


class Literal(Dense):
    """The algorithm with dense projections, and the memory of each adapter as columns of M."""

    def __init__(self, model: nn.Module, variant: str) -> None:
        super().__init__(model)
        self.variant = variant
        self.memory = {key: torch.zeros(WIDTH, 0, dtype=WIDE) for key in KEYS}

    def remember(self, key: str, matrix: Tensor, epsilon: float) -> None:
        """Left singular vectors of `matrix` `[d_in, n]` outside of M until they hold the share epsilon."""
        m = self.memory[key]
        total = float((torch.linalg.svdvals(matrix) ** 2).sum())
        new, values, _ = torch.linalg.svd(matrix - m @ m.T @ matrix)
        share = (total - float((values**2).sum())) / total
        count = 0
        if self.variant == "official" and m.shape[1] == 0:
            count = max(int(((values**2 / total).cumsum(0) < epsilon).sum()), 1)
        else:
            while share < epsilon and count < WIDTH - m.shape[1]:
                share += float(values[count] ** 2) / total
                count += 1
        self.memory[key] = torch.cat([m, new[:, :count]], 1)

    def remember_weights(self, epsilon: float) -> None:
        """The principal directions of the pretrained weights."""
        for key, (layer, first) in ROWS.items():
            weight = self.weights[layer][first : first + WIDTH]
            self.remember(key, weight.T if self.variant == "paper" else weight, epsilon)

    def inputs(self, x: Tensor, layer: str) -> Tensor:
        """Those of a layer, `[rows, d_in]`."""
        model = Tiny().double()
        weights = {f"{name}.weight": self.weight(name).detach() for name in ("qkv", "fc")}
        model.load_state_dict({**weights, **self.constant, **self.head})
        seen = []
        getattr(model, layer).register_forward_hook(lambda _m, args, _y: seen.append(args[0].detach()))
        model(x)
        return seen[0].flatten(0, 1)

    def remember_features(self, x: Tensor, size: int, epsilon: float) -> None:
        """The features of a task: of all samples, or summed over batches."""
        for key, (layer, _) in ROWS.items():
            parts = [self.inputs(batch, layer) for batch in x.split(size)]
            rows = torch.cat(parts) if self.variant == "paper" else torch.stack(parts).sum(0)
            self.remember(key, rows.T, epsilon)

    def choose(self, x: Tensor, y: Tensor, size: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B A of the start) of every adapter, from the mean of the gradients of batches."""
        steps = list(zip(x.split(size), y.split(size), strict=True))
        chosen = {}
        for key in KEYS:
            found = [
                self.weight_gradients(lambda b=b: F.cross_entropy(self.logits(b[0]), b[1]))[key]
                for b in steps
            ]
            gradient = torch.stack(found).mean(0)
            m = self.memory[key]
            u, s, vh = torch.linalg.svd(gradient - gradient @ m @ m.T)
            start = (u[:, :rank] * s[:rank]) @ vh[:rank]
            chosen[key] = vh[:rank], start if self.variant == "official" else 0 * start
        return chosen


def projector(subspace: Subspace) -> Tensor:
    p = subspace.basis @ subspace.basis.T
    return torch.eye(WIDTH, dtype=WIDE) - p if subspace.complement else p


def adapter(model: nn.Module, key: str) -> tuple[nn.Parameter, nn.Parameter]:
    layer, _, piece = key.partition(".")
    parts = {s.name: (a, b) for s, a, b in getattr(model, layer).adapter_parameters()}
    return parts[piece]


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("epsilon_w", "epsilon_f"), [(0.4, 0.5), (0.0, 0.6)])
def test_literal_three_tasks(variant, epsilon_w, epsilon_f):
    """Three tasks are those of the literal algorithm."""
    model = fresh()
    method = KeepLoRA(model, epsilon_w=epsilon_w, epsilon_f=epsilon_f, variant=variant)
    dense = Literal(model, variant)
    if epsilon_w:
        dense.remember_weights(epsilon_w)
    ranks = []
    for task in range(3):
        x, y = data(8, seed=task)
        method.begin_task(task)
        for b in dense.b.values():
            b.data.zero_()
        expected = dense.choose(x, y, 4, 2)
        method.prepare(batches(x, y, 4), F.cross_entropy)
        for key, (rows, start) in expected.items():
            lora_a, lora_b = adapter(model, key)
            close(lora_a.T @ lora_a, rows.T @ rows, 1e-9, f"A of {key}")
            close(lora_b @ lora_a, start, 1e-9, f"start of {key}")
            dense.a[key] = lora_a.detach().clone()  # of two signs per row either is right
            dense.b[key] = lora_b.detach().clone().requires_grad_()
            layer, first = ROWS[key]
            dense.weights[layer][first : first + WIDTH] -= start
        dense.assert_is(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
        literal = torch.optim.AdamW([*dense.b.values(), *dense.head.values()], lr=0.05, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            optimizer.step()
            method.after_step(step, 3)
            literal.zero_grad()
            F.cross_entropy(dense.logits(x), y).backward()
            literal.step()
            dense.assert_is(model)
        dense.remember_features(x, 4, epsilon_f)
        dense.merge()
        method.end_task(batches(x, y, 4), F.cross_entropy)
        for key, used in method.subspaces.items():
            memory = dense.memory[key]
            close(projector(used), memory @ memory.T, 1e-9, f"subspace of {key}")
            assert used.rank == memory.shape[1] and used.basis.shape[1] <= WIDTH / 2
            ranks.append(used.rank)
        for b in dense.b.values():
            b.data.zero_()
        dense.assert_is(model)
    assert 0 < min(ranks) < max(ranks) and all(rank < WIDTH for rank in ranks[:6]), ranks
    assert method.report().summary == {"directions": 3 * WIDTH, "protected": sum(ranks[-3:])}
    assert type(method.export().fc) is nn.Linear


def test_shares_by_layer():
    """Each layer's principal directions hold the share of the first expression that matches its name."""
    shares = {"qkv": 0.2, "[qf].*": 0.6}
    mixed = KeepLoRA(fresh(), epsilon_w=shares)
    alone = {share: KeepLoRA(fresh(), epsilon_w=share) for share in (0.2, 0.6)}
    x, y = data(8)
    for method in (mixed, *alone.values()):
        method.begin_task(0)
        method.prepare(batches(x, y, 4), F.cross_entropy)
    ranks = set()
    for key, used in mixed.subspaces.items():
        own, other = (0.6, 0.2) if key == "fc" else (0.2, 0.6)
        assert torch.equal(used.basis, alone[own].subspaces[key].basis)
        assert used.rank != alone[other].subspaces[key].rank
        ranks.add(key)
    assert ranks == set(KEYS)
    for bad, message in (
        ({"qkv": 0.2}, "epsilon_w: expected a share for every layer, none of .* matches fc"),
        ({**shares, "head": 0.1}, "epsilon_w: 'head' matches none of the layers"),
        ({"qkv": 0.2, ".*": 1.5}, r"epsilon_w\['.\*'\]: expected"),
        ({"(": 0.2}, "epsilon_w"),
        ({0: 0.2}, "epsilon_w: expected regular expressions as keys, got 0"),
    ):
        model = nn.Sequential(OrderedDict(qkv=nn.Linear(4, 4), fc=nn.Linear(4, 4)))
        with pytest.raises(fe.ArgumentError, match=message):
            KeepLoRA(model, fe.LoRAConfig(r=2, target_modules=["qkv", "fc"]), epsilon_w=bad)
        assert type(model.fc) is nn.Linear


def test_old_inputs_protected():
    """With epsilon_f 1 later updates are 0 on the inputs of the first task, and A is off the weight's own
    directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 4, bias=False)).double()
    principal = torch.linalg.svd(model[0].weight.detach()).Vh[:1]
    method = KeepLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), epsilon_w=1e-6, epsilon_f=1.0)
    old = torch.randn(9, 2).double() @ torch.randn(2, WIDTH).double()  # of rank 2
    for task, x in enumerate((old, torch.randn(9, WIDTH).double())):
        y = torch.randint(4, (9,))
        method.begin_task(task)
        method.prepare([(x, y)])
        assert float((principal @ model[0].lora_A.T).abs().max()) < 1e-12
        with torch.no_grad():
            model[0].lora_B.normal_()
        before, new = model(old), model(x)
        method.end_task([(x, y)])
        close(model(x), new, 1e-12, "what the task learned")
        assert method.subspaces["0"].rank == (3, WIDTH)[task]
    close(model(old), before, 1e-12, "old inputs")
    method.begin_task(2)
    method.prepare([(x, y)])
    assert not model[0].lora_A.any()  # no direction is left


def test_only_b_trained():
    """Only B is trained; k and v have their own A."""
    model = fresh()
    method = KeepLoRA(model, epsilon_w=0.3)
    method.begin_task(0)
    x, y = data(6)
    method.prepare([(x, y)])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"qkv.lora_B_k", "qkv.lora_B_v", "fc.lora_B", "head.weight", "head.bias"}
    assert not torch.equal(model.qkv.lora_A_k, model.qkv.lora_A_v)
    F.cross_entropy(model(x), y).backward()
    assert model.qkv.lora_A_k.grad is None and model.qkv.lora_B_k.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_start(dtype):
    """The official start changes W and B, and what the model computes only by the rounding of W."""
    model = fresh(dtype=dtype, lora_alpha=1.0)
    method = KeepLoRA(model, variant="official", epsilon_w=0.4)
    x, y = data(8, dtype=dtype)
    method.begin_task(0)
    before = {name: layer.base_weight.float().clone() for name, layer in method.layers.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        method.prepare(batches(x, y, 4))
    for name, layer in method.layers.items():
        assert all(b.any() for _, _, b in layer.adapter_parameters())
        error = (layer.consolidated_weight().float() - before[name]).abs().max()
        assert float(error) <= 2 * torch.finfo(dtype).eps * float(before[name].abs().max())
        assert layer.consolidated_tasks == 0


def whole(method: KeepLoRA) -> dict[str, Tensor]:
    return snapshot(method.model, {key: used.basis for key, used in method.subspaces.items()})


def task(method: KeepLoRA) -> None:
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


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("after", [0, 2])
def test_resume_fresh_model(after, variant, tmp_path):
    """A saved state goes on in a fresh model, bit for bit."""
    options = {"epsilon_w": 0.3, "epsilon_f": 0.5, "variant": variant}
    method = KeepLoRA(fresh(), **options)
    for _ in range(after):
        task(method)
    torch.save([method.model.state_dict(), method.state_dict()], tmp_path / "state.pt")
    model_state, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = KeepLoRA(fresh(seed=8), **options)
    other.model.load_state_dict(model_state)
    other.load_state_dict(state)
    assert other.tasks == after == other.model.fc.consolidated_tasks
    task(method)
    task(other)
    assert_same(whole(method), whole(other))


def test_refused():
    """Bad values, layers and data are refused before anything is changed."""
    for options in ({"epsilon_w": 1.1}, {"epsilon_f": -0.1}, {"variant": "mine"}, {"max_batches": 0}):
        model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(fe.ArgumentError, match=next(iter(options))):
            KeepLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), **options)
        assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(fe.TargetError, match="as many of both, got 3 and 4"):
        KeepLoRA(model, fe.LoRAConfig(r=2, target_modules=["0"]), variant="official")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    x, y = data(6)
    for variant in ("paper", "official"):
        trained = KeepLoRA(adapted(), variant=variant)
        trained.begin_task(0)
        with pytest.raises(fe.ArgumentError, match="lora_B of 0"):
            trained.prepare([(x, y)])
        method = KeepLoRA(fresh(), variant=variant)
        with pytest.raises(fe.ArgumentError, match="begin_task first"):
            method.prepare([(x, y)])
        method.begin_task(0)
        with pytest.raises(fe.ArgumentError, match="prepare"):
            method.penalty()
        before = snapshot(method.model)
        for loader in ([], [(x * torch.nan, y)]):
            with pytest.raises(fe.FisherError):
                method.prepare(loader)
        fe.merge(method.model)
        with pytest.raises(fe.TargetError, match="merged"):
            method.prepare([(x, y)])
        fe.unmerge(method.model)
        assert_same(before, snapshot(method.model))
        assert not method.subspaces
        method.prepare([(x, y)])
        before = snapshot(method.model)
        bad = [([(x * torch.nan, y)], "finite")]
        bad += [(batches(x, y, 4), "drop_last")] if variant == "official" else []
        for loader, message in bad:
            with pytest.raises(fe.ArgumentError, match=message):
                method.end_task(loader)
        assert_same(before, snapshot(method.model))


def test_weight_not_finite():
    """A start that is not finite is refused and nothing changes."""
    method = KeepLoRA(fresh(), variant="official", epsilon_w=0.0)
    method.begin_task(0)
    with torch.no_grad():
        method.model.qkv.weight[0, 0] = torch.inf  # a row of q, without an adapter
        method.model.qkv.bias[0] = 0.0
    before = snapshot(method.model)
    with pytest.raises(fe.EWCLoRAError):
        method.prepare([data(6)])
    assert_same(before, snapshot(method.model))
