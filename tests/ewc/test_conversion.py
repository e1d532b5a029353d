# SPDX-License-Identifier: Apache-2.0
"""Fishers that are kept, converted from one structure to another between tasks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, assert_same, batches, data, train, whole

from fused_ewclora.errors import ArgumentError, DtypeError, FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.structures.factored import Factored

DENSE = {"dense": {}, "bf16": {"fisher_dtype": torch.bfloat16}, "8bit": {"fisher_dtype": "8bit"}}
TARGETS = {
    **{name: ("dense", options.get("fisher_dtype", torch.float32)) for name, options in DENSE.items()},
    **{name: (name, torch.float32) for name in ("factored", "uniform", "kronecker")},
}


def after_tasks(**options):
    model = adapted(dtype=torch.float32)
    ewc = EWC(model, 2.0, **options)
    for task in range(2):
        end(ewc, task)
        train_one(model, ewc, task)
    return model, ewc


def end(ewc, task: int, **options) -> None:
    ewc.end_task(batches(*data(5, seed=task, dtype=torch.float32), 2), F.cross_entropy, **options)


def train_one(model, ewc, task: int) -> None:
    x, y = data(8, seed=100 + task, dtype=torch.float32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
    optimizer.step()
    model.zero_grad()


def dense_of(ewc) -> dict[str, torch.Tensor]:
    return {
        k: f.double() if isinstance(f, torch.Tensor) else f.dense().double() for k, f in ewc.fishers.items()
    }


def penalty_of(ewc, dense) -> float:
    total = 0.0
    for ref in ewc._placement.refs:
        a, b = ref.matrices()
        delta = (b.double() * ref.piece.scaling) @ a.double()
        total += (dense[ref.key] * delta.square()).sum().item()
    return 0.5 * ewc.ewc_lambda * total


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", DENSE)
def test_converted(source: str, target: str):
    """What is kept is the structure of the dense F, the error is told, and tasks go on."""
    model, ewc = after_tasks(**DENSE[source])
    exact, history = dense_of(ewc), ewc.history
    fisher, dtype = TARGETS[target]
    errors = ewc.convert_fisher_(fisher, dtype)
    found = dense_of(ewc)
    sums = {"factored": exact, "kronecker": exact}
    for key, value in exact.items():
        if target == source or target == "dense":
            assert torch.equal(found[key], value)
        elif target in sums:
            for dim in (0, 1):
                torch.testing.assert_close(found[key].sum(dim), value.sum(dim), rtol=1e-5, atol=0.0)
        elif target == "uniform":
            torch.testing.assert_close(found[key], value.mean().expand_as(value), rtol=1e-5, atol=0.0)
        else:
            step = {"bf16": 2.0**-8, "8bit": 255**-0.5}[target] * value.amax(1, keepdim=True)
            assert bool(((found[key] - value).abs() <= step).all())
        error = float((found[key] - value).norm() / value.norm())
        assert errors[key] == pytest.approx(error, rel=1e-4, abs=1e-7)
    assert set(errors) == set(exact) and ewc.history == history
    if target != "kronecker":
        assert ewc.penalty().item() == pytest.approx(penalty_of(ewc, found), rel=1e-4)
    fresh = EWC(adapted(dtype=torch.float32), 2.0, fisher=fisher, fisher_dtype=dtype)
    fresh.load_state_dict(ewc.state_dict())
    end(ewc, 2)
    assert ewc.tasks == 3
    train_one(model, ewc, 2)
    assert ewc.penalty().item() > 0.0


def test_uniform_of_factored():
    """The mean is all that "uniform" needs, and is the same from either."""
    _, ewc = after_tasks(fisher="factored")
    mean = {key: fisher.mean() for key, fisher in dense_of(ewc).items()}
    ewc.convert_fisher_("uniform")
    for key, fisher in dense_of(ewc).items():
        torch.testing.assert_close(fisher, mean[key].expand_as(fisher), rtol=1e-5, atol=0.0)


def test_before_tasks():
    """Before the first task there is nothing to convert, and the task is gathered for the new structure."""
    model = adapted(dtype=torch.float32)
    ewc = EWC(model, 2.0)
    assert ewc.convert_fisher_("factored") == {}
    end(ewc, 0)
    assert isinstance(ewc.structure, Factored) and ewc.state_dict()["config"]["fisher"] == "factored"


def test_double():
    """Beside fp64 layers numbers may be fp64."""
    model = adapted()
    ewc = EWC(model, 2.0, fisher_dtype=torch.float64)
    ewc.end_task(batches(*data(5), 2), F.cross_entropy)
    train(model, ewc, 0)
    exact = dense_of(ewc)
    ewc.convert_fisher_("factored", torch.float64)
    for key, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher.rows, exact[key].sum(1), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["factored", "uniform", "kronecker"])
def test_lost(name: str):
    """What is lost is lost: nothing comes of structures without single numbers, and nothing changes."""
    model, ewc = after_tasks(fisher=name)
    before = whole(model, ewc)
    others = ("dense", torch.float32), ("dense", "8bit"), ("kronecker", torch.float32)
    for fisher, dtype in others[: 2 if name == "kronecker" else 3]:
        with pytest.raises(FisherError, match=f"convert_fisher_: fisher='{name}' does not have"):
            ewc.convert_fisher_(fisher, dtype)
    assert set(ewc.convert_fisher_(name).values()) == {0.0}
    assert_same(before, whole(model, ewc))
    assert ewc.structure.name == name


def test_refused(monkeypatch: pytest.MonkeyPatch):
    """Modes, dtypes, times and values that do not fit are refused by name, and nothing changes."""
    model, ewc = after_tasks(fisher_mode="batch")
    before = whole(model, ewc)
    with pytest.raises(ArgumentError, match=r"fisher_mode: expected one of \('sample',\)"):
        ewc.convert_fisher_("kronecker")
    with pytest.raises(ArgumentError, match="fisher: expected one of"):
        ewc.convert_fisher_("diagonal")
    with pytest.raises(DtypeError, match="fisher='uniform', got '8bit'"):
        ewc.convert_fisher_("uniform", "8bit")
    with pytest.raises(DtypeError, match="fisher_dtype: expected one of"):
        ewc.convert_fisher_("dense", torch.float64)
    ewc.estimate_fisher(batches(*data(5, dtype=torch.float32), 2), F.cross_entropy)
    with pytest.raises(FisherError, match="convert_fisher_: this task has a Fisher already"):
        ewc.convert_fisher_("factored")
    ewc.consolidate()
    assert ewc.structure.name == "dense"
    ewc._state.fishers["fc"][0, 0] = torch.inf
    with pytest.raises(FisherError, match="convert_fisher_: Fisher of fc: expected finite values"):
        ewc.convert_fisher_("dense", "8bit")
    assert ewc.structure.name == "dense" and before.keys() == whole(model, ewc).keys()
