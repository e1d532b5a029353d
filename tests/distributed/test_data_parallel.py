# SPDX-License-Identifier: Apache-2.0
"""`nn.DataParallel`: its replicas have no parameters, only copies of them as attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense_fisher import dense_fisher
from models import MLP, randomize_adapters_
from replicas import Replicated
from torch import Tensor, nn

import fused_ewclora as fe

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0, 1])
LAYOUT = fe.QKVLayout(("k", "v"), (4, 6))
WHOLE = fe.LoRAConfig(r=2, target_modules=["fc1", "fc2"])


class Attending(nn.Module):
    """`nn.MultiheadAttention` on three tokens per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, batch_first=True)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (3, 2))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Convolving(nn.Module):
    """A convolution over pictures of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, (1, 2), bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.reshape(len(x), 1, 2, 3))).mean((2, 3)))


class Shared(MLP):
    """The second layer runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))


def made(kind: type[nn.Module] = MLP, config: fe.LoRAConfig = WHOLE) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double()
    fe.inject(model, config)
    randomize_adapters_(model)
    return model


def scaled() -> nn.Module:
    """With learned scales."""
    model = made()
    for layer in fe.adapters(model).values():
        layer.lora_scale = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
    return model


def directions(magnitudes: str = "per_adapter") -> nn.Module:
    """The second task of SD-LoRA."""
    torch.manual_seed(0)
    model = MLP().double()
    method = fe.methods.SDLoRA(model, WHOLE, magnitudes=magnitudes)
    for task in range(2):
        method.begin_task(task)
        randomize_adapters_(model)
        if task == 0:
            method.end_task([])
    return model


def gated() -> nn.Module:
    """CoDyRA with ranks that are left out."""
    torch.manual_seed(0)
    model = MLP().double()
    fe.methods.CoDyRA(model, WHOLE).begin_task(0)
    randomize_adapters_(model)
    return model


def merged() -> nn.Module:
    model = made()
    fe.merge(model)
    model.head.requires_grad_(True)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": made,
    "slices": lambda: made(config=fe.LoRAConfig(2, target_modules=["fc1"], slices=("v",), layout=LAYOUT)),
    "shared": lambda: made(Shared),
    "attention": lambda: made(Attending, fe.LoRAConfig(2, target_modules=["out_proj", "head"])),
    "convolution": lambda: made(Convolving, fe.LoRAConfig(2, target_modules=["conv"])),
    "projections": lambda: made(Attending, fe.LoRAConfig(2, target_modules=["attention"])),
    "scaled": scaled,
    "directions": directions,
    "directions with shared magnitudes": lambda: directions("shared"),
    "gated": gated,
    "merged": merged,
}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("case", MODELS)
def test_same_as_alone(case: str, replicas: int):
    """Outputs, and gradients at the original parameters, are those of the model alone."""
    model = MODELS[case]().eval()
    parallel = Replicated(model, replicas)
    expected = gradients(model, F.cross_entropy(model(X), Y))
    actual = gradients(model, F.cross_entropy(parallel(X), Y))
    torch.testing.assert_close(parallel(X), model(X), rtol=1e-12, atol=1e-12)
    assert {name for name, grad in actual.items() if grad is not None}
    for name, grad in expected.items():
        if grad is None and actual[name] is not None:  # a gradient passes through every copy, used or not
            grad = torch.zeros_like(actual[name])
        torch.testing.assert_close(actual[name], grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(parallel(X), model(X), rtol=1e-12, atol=1e-12)


def test_disabled():
    """Disabled adapters are disabled in replicas."""
    model = made()
    parallel = Replicated(model)
    with fe.disabled(parallel):
        torch.testing.assert_close(parallel(X), model(X))


def test_calls_counted():
    """Calls of replicas count as calls of the layer."""
    model = made()
    parallel = Replicated(model)
    parallel(X)
    fe.check_bypass(parallel)
    assert {layer.forward_calls for layer in fe.adapters(model).values()} == {2}
    assert fe.verify_forward(parallel, X) == {"module.fc1": 1, "module.fc2": 1}  # of the model inside
    assert [row["calls"] for row in fe.explain(parallel, X).rows] == [1, 1]


def trained(model: nn.Module, run: nn.Module) -> tuple[fe.EWC, list[float]]:
    """Two tasks, of which the second has a penalty."""
    model.head.requires_grad_(True)
    ewc, losses = fe.EWC(run, ewc_lambda=10.0, generator=torch.Generator().manual_seed(1)), []
    for task in range(3):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(run(X), (Y + task) % 4) + ewc.penalty()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ewc.end_task([(X, (Y + task) % 4)], F.cross_entropy)
    return ewc, losses


def test_three_tasks(tmp_path: Path):
    """Training, penalty, Fisher and consolidation are those of the model alone; names have no prefix."""
    alone, replicated = made(), made()
    ewc, losses = trained(alone, alone)
    other, others = trained(replicated, Replicated(replicated))
    assert losses == pytest.approx(others, rel=1e-9)
    assert list(ewc.fishers) == list(other.fishers) == ["fc1", "fc2"]
    for name, fisher in ewc.fishers.items():
        torch.testing.assert_close(other.fishers[name], fisher, rtol=1e-6, atol=1e-9)
    for (name, value), found in zip(
        alone.state_dict().items(), replicated.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=name)


def test_fisher_exact():
    """The Fisher is that of one sample at a time."""
    torch.manual_seed(0)
    plain = MLP().double()
    model = copy.deepcopy(plain)
    fe.inject(model, WHOLE)
    ewc = fe.EWC(Replicated(model), ewc_lambda=1.0)
    ewc.end_task([(X, Y)], F.cross_entropy)
    samples = [(X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]
    expected = dense_fisher(plain, ["fc1", "fc2"], samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]))
    for name, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher.double(), expected[name], rtol=1e-5, atol=1e-9)


def _pass(ewc: fe.EWC, model: nn.Module) -> None:
    with ewc.accumulate_fisher():
        F.cross_entropy(model(X), Y).backward()


def test_replicas_in_pass():
    """Replicas in a Fisher pass are refused, and the module inside is not."""
    model = made()
    parallel = Replicated(model)
    ewc = fe.EWC(parallel, ewc_lambda=1.0)
    with pytest.raises(fe.FisherError, match=r"fc1: a Fisher pass through the replicas.*model\.module\(x\)"):
        _pass(ewc, parallel)
    _pass(ewc, parallel.module)
    ewc.consolidate()
    assert ewc.tasks == 1


def test_saved_without_prefix(tmp_path: Path):
    """A checkpoint of a model inside `nn.DataParallel` loads into the plain model, and back."""
    model, plain = made(), made(config=WHOLE)
    parallel = Replicated(model)
    ewc, other = fe.EWC(parallel, ewc_lambda=1.0), fe.EWC(plain, ewc_lambda=1.0)
    ewc.estimate_fisher([(X, Y)], F.cross_entropy)
    ewc.consolidate()
    fe.save_pretrained(tmp_path / "first", parallel, ewc)
    fe.load_pretrained(tmp_path / "first", plain, other)
    assert torch.equal(plain(X), model(X)) and other.tasks == 1
    fe.save_pretrained(tmp_path / "second", plain, other)
    fe.load_pretrained(tmp_path / "second", parallel, ewc)


def test_injected_inside():
    """A model that is wrapped already gets the same adapters, and `"all-linear"` leaves out its head."""
    model = MLP()
    parallel = Replicated(model)
    fe.inject(parallel, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert list(fe.adapters(model)) == ["fc1", "fc2"]
    parallel(X.float())
    fe.eject(parallel)
    assert type(model.fc1) is nn.Linear


OPTIONS = {
    "EWCLoRA": {"ewc_lambda": 1.0},
    "FactorEWC": {"ewc_lambda": 1.0},
    "CLLoRA": {"shared": ["fc1"]},
    "NLoRA": {"lambda_1": 0.01},
    "IEL": {"beta": 1.0},
    "ITA": {"alpha": 1.0},
}
METHODS = (
    "InfLoRA",
    "KeepLoRA",
    "CLLoRA",
    "EWCLoRA",
    "FactorEWC",
    "SDLoRA",
    "CoDyRA",
    "OLoRA",
    "NLoRA",
    "IEL",
    "ITA",
    "PerturbAndMerge",
)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str):
    """Methods on a wrapped model learn what they learn on the model alone."""
    method, outputs = getattr(fe.methods, name), []
    for wrap in (lambda model: model, Replicated):
        torch.manual_seed(0)
        model = MLP().double()
        run = wrap(model)
        options = OPTIONS.get(name, {})
        learning = method(run, WHOLE, **options)
        for task in range(2):
            learning.begin_task(task)
            learning.prepare([(X, Y)])
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            optimizer.zero_grad()
            (F.cross_entropy(run(X), Y) + learning.penalty()).backward()
            optimizer.step()
            learning.after_step(0, 1)
            learning.end_task([(X, Y)], F.cross_entropy)
        outputs.append(run(X).detach())
        assert list(learning.layers) == ["fc1", "fc2"]
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-9)
