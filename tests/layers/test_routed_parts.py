# SPDX-License-Identifier: Apache-2.0
"""Parts that take some rows of their owner's input, and have groups of their own, as experts do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same, fingerprint, randomize_adapters_
from replicas import Replicated
from torch import Tensor, nn
from toy_experts import EXPERTS, D, Experts, Mixture, is_known

import fused_ewclora as fe
from fused_ewclora.integrations import _transformers_experts as experts_of
from fused_ewclora.layers.grouping import grouped_rows
from fused_ewclora.layers.parts import Part

TARGETS = fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["experts"])
SAMPLE = {"ewc_lambda": 1.0, "fisher_mode": "sample", "fisher_dtype": torch.float64}
TOKENS = 3


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_of, "_known", is_known)


class TokensFirst(Mixture):
    """Rows in the order of the tokens, with the samples of each together."""

    def rows(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)

    def tokens(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return rows.unflatten(0, sizes[::-1]).transpose(0, 1)


class Shuffled(Mixture):
    """Rows in no order that is known."""

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x)[self.order(x.shape[0] * x.shape[1])]

    def tokens(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return super().tokens(rows[self.order(len(rows)).argsort()], sizes)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def model_of(kind: type[Mixture] = Mixture, calls: int = 1) -> Mixture:
    torch.manual_seed(0)
    model = kind(calls).double()
    fe.inject(model, TARGETS)
    randomize_adapters_(model)
    return model


def data(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """No token goes to the last expert."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, TOKENS, D, generator=generator, dtype=torch.float64)
    first = torch.randint(EXPERTS - 2, (samples, TOKENS), generator=generator)
    x[..., 0] = 0.1 * first + 0.05
    return x, torch.arange(samples) % 3


def exact(model: Mixture, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The mean of squared gradients of single samples in the dense model, by Fisher key."""
    dense = copy.deepcopy(model)
    fe.eject(dense)
    leaves = ("gate_up_proj", "down_proj")
    total: dict[str, Tensor] = {}
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(dense(one[None]), label[None])
        for leaf, gradient in zip(
            leaves,
            torch.autograd.grad(loss, [getattr(dense.experts, leaf) for leaf in leaves]),
            strict=True,
        ):
            for expert in range(EXPERTS):
                key = f"experts.{expert}.{leaf}"
                total[key] = total.get(key, 0.0) + gradient[expert].T.square() / len(y)
    return total


@pytest.mark.parametrize(("kind", "calls"), [(Mixture, 1), (TokensFirst, 1), (Mixture, 2), (TokensFirst, 2)])
def test_orders_and_calls(kind: type[Mixture], calls: int):
    """The Fisher of samples is exact in every known order of the rows, and over several calls."""
    x, y = data(6)
    model = model_of(kind, calls)
    wanted = exact(model, x, y)
    ewc = fe.EWC(model, **SAMPLE)
    ewc.end_task([(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])], F.cross_entropy)
    assert ewc.fishers.keys() == wanted.keys()
    for key, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, wanted[key], rtol=1e-10, atol=1e-15)
        assert fisher.any() == (f"experts.{EXPERTS - 1}." not in key)


def test_unknown_order():
    """Rows in an unknown order are refused by the name of the owner; a function for it tells them."""
    x, y = data(6)
    model = model_of(Shuffled)
    before = fingerprint(model)
    with pytest.raises(fe.FisherError, match=r"^experts: the pass cannot tell which rows"):
        fe.EWC(model, **SAMPLE).end_task([(x, y)], F.cross_entropy)
    assert_same(before, fingerprint(model))
    wanted, ewc = exact(model, x, y), fe.EWC(model, **SAMPLE)
    tell = lambda rows: model.order(len(rows)) // TOKENS  # noqa: E731
    ewc.estimate_fisher([(x, y)], F.cross_entropy, rows_to_samples={"experts": tell})
    ewc.consolidate()
    for key, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, wanted[key], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_by_hand(mode: str):
    """A pass by hand finds the samples of rows as well; without their number it is refused."""
    x, y = data(4)
    model = model_of()
    fishers = []
    for by_hand in (True, False):
        ewc = fe.EWC(copy.deepcopy(model), **{**SAMPLE, "fisher_mode": mode})
        if by_hand:
            with ewc.accumulate_fisher(batch_size=None if mode == "sample" else 4):
                F.cross_entropy(ewc.model(x), y).backward()
        else:
            ewc.estimate_fisher([(x, y)], F.cross_entropy)
        ewc.consolidate()
        fishers.append(ewc.fishers)
    for key, fisher in fishers[0].items():
        torch.testing.assert_close(fisher, fishers[1][key], rtol=1e-10, atol=1e-15)
    ewc = fe.EWC(model, **{**SAMPLE, "fisher_mode": mode})
    refused = pytest.raises(fe.FisherError, match="batch_size: experts hands on the 12 rows")
    with refused, ewc.accumulate_fisher(check_samples=False):
        F.cross_entropy(model(x), y).backward()


def test_idle_parts():
    """An owner that never runs is an error; parts that no row reaches have gradients and Fishers of 0."""
    model = model_of()
    x, y = data(4)
    F.cross_entropy(model(x), y).backward()
    idle = model.experts.get_submodule(f"{EXPERTS - 1}.down_proj")
    assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())
    model = model_of(calls=0)
    with pytest.raises(fe.TargetError, match="none of its adapted layers did"):
        fe.EWC(model, **SAMPLE).end_task([(x, y)], F.cross_entropy)


def test_untrained_warning(recwarn: pytest.WarningsRecorder):
    """A part that gets no rows in a task is no sign of a bypass; that no part was trained is one."""
    x, y = data(4)
    for targets in ("experts", "inner"):
        model = Mixture().double()
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["inner", "experts"]))
        held = [p for n, p in model.named_parameters() if "lora" in n and n.startswith(("inner", targets))]
        optimizer = torch.optim.SGD(held, 0.1)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        fe.EWC(model, **SAMPLE).end_task([(x, y)], F.cross_entropy)
        told = [str(one.message) for one in recwarn if issubclass(one.category, fe.EWCLoRAWarning)]
        expected = ["end_task: experts: lora_B is still zero"] if targets == "inner" else []
        assert [text.partition(" although")[0] for text in told] == expected
        recwarn.clear()


def test_groups():
    """Groups are modules while they have parts; a module of the same name keeps the parts out."""
    model = Mixture()
    before = fingerprint(model)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["experts.1", "2.down_proj"]))
    assert [name for name, _ in model.experts.named_children()] == ["1", "2"]
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["2.gate_up_proj"]))
    assert len(fe.adapters(model)) == 4
    fe.eject(model)
    assert type(model.experts) is Experts and not list(model.experts.children())
    assert before.keys() == fingerprint(model).keys()
    model.experts.add_module("1", nn.Linear(2, 2))
    with pytest.raises(fe.TargetError, match=r"experts\.1\.gate_up_proj: it has a 1 already"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["1.gate_up_proj"]))


def test_ranks():
    """rank_pattern and alpha_pattern know a part by its own name first, then by its group, its parameter and
    its owner."""
    model = Mixture()
    ranks = {"experts.1.down_proj": 5, "experts.1": 4, "experts.gate_up_proj": 3, "experts": 2}
    fe.inject(model, fe.LoRAConfig(r=1, target_modules=["experts"], rank_pattern=ranks))
    found = {name: layer.r for name, layer in fe.adapters(model).items()}
    assert [found[f"experts.1.{leaf}"] for leaf in ("down_proj", "gate_up_proj")] == [5, 4]
    assert [found[f"experts.0.{leaf}"] for leaf in ("down_proj", "gate_up_proj")] == [2, 3]


@given(st.sets(st.integers(0, 12), min_size=1))
def test_grouped_rows(indices: set[int]):
    """A row stands for all parts that are alike; sums are over these, and their number can be told."""
    parts = [Part(f"{i}.down", "down", 2, 2, index=i) for i in sorted(indices)]
    rows = [(part, {"name": f"m.{part.name} [k]", "r": 2, "params": part.index}) for part in parts]
    ((row),) = grouped_rows([*rows, (None, {"name": "fc", "r": 2, "params": 1})], ("params",))[:1]
    assert row["params"] == sum(indices)
    name = row["name"].removeprefix("m.").removesuffix(".down [k]")
    if "(" in name:
        assert int(name.split("(")[1].rstrip(")")) == len(indices)
    else:
        ends = [list(map(int, piece.split("-"))) for piece in name.split(",")]
        assert {i for pair in ends for i in range(pair[0], pair[-1] + 1)} == indices


def test_distinct_rows():
    """Parts of other owners, ranks or rows have rows of their own."""
    rows = [
        (Part(f"{i}.down", "down", 2, 2, index=i), {"name": f"{owner}{i}.down", "r": r})
        for owner, i, r in (("a.", 0, 2), ("a.", 1, 2), ("a.", 2, 3), ("b.", 0, 2), ("", 0, 2))
    ]
    names = [row["name"] for row in grouped_rows(rows, ())]
    assert names == ["a.0-1.down", "a.2.down", "b.0.down", "0.down"]


def test_data_parallel():
    """Routed parts run in replicas, with the gradients of the model alone, and count as called there."""
    model, (x, y) = model_of(), data(6)
    grads = []
    for run in (model, Replicated(model)):
        model.zero_grad()
        F.cross_entropy(run(x), y).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert grads[0]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        Replicated(model)(x)
    assert {layer.forward_calls for layer in fe.adapters(model).values()} == {5}
