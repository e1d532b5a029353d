# SPDX-License-Identifier: Apache-2.0
"""Structures of the Fisher beside the dense one, from pass to penalty to merge, against dense copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    KEYS,
    TOKENS,
    adapted,
    assert_same,
    batches,
    data,
    fresh,
    plain,
    randomise,
    squares,
    train,
    whole,
)
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.checkpoints.checkpoint import load_pretrained, save_pretrained
from fused_ewclora.errors import ArgumentError, DtypeError, FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.structures import Extent, Structure, Weights
from fused_ewclora.ewc.structures.factored import Factored
from fused_ewclora.ewc.structures.kronecker import nearest_product
from fused_ewclora.fishers import EightBitFisher, FactoredFisher, KroneckerFisher

STRUCTURES = {
    "8bit": {"fisher_dtype": "8bit"},
    "factored": {"fisher": "factored", "fisher_dtype": torch.float64},
    "kronecker": {"fisher": "kronecker", "fisher_dtype": torch.float64},
    "uniform": {"fisher": "uniform", "fisher_dtype": torch.float64},
}
SAMPLES = 5
OTHERS = pytest.mark.parametrize("name", STRUCTURES)


def end(model, ewc, task: int, mode: str = "sample", gamma: float | None = None) -> dict[str, torch.Tensor]:
    """Ends a task; returns its dense Fisher."""
    x, y = data(SAMPLES, seed=task)
    parts = batches(x, y, 1 if mode == "sample" else 2)
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in parts]
    exact = squares(model, losses, [len(y) / SAMPLES for _, y in parts])
    ewc.end_task(batches(x, y, 2), F.cross_entropy, gamma=gamma)
    return exact


def after_tasks(name: str, count: int = 2, **options):
    """A model and an EWC after some tasks, and the sum of their dense Fishers."""
    model = adapted()
    ewc = EWC(model, 2.0, **STRUCTURES[name], **options)
    dense = dict.fromkeys(KEYS, 0.0)
    for task in range(count):
        train(model, ewc, task)
        exact = end(model, ewc, task, options.get("fisher_mode", "sample"))
        dense = {key: dense[key] + exact[key] for key in KEYS}
    train(model, ewc, count)
    return model, ewc, dense


def penalty_of(ewc, dense) -> torch.Tensor:
    total = 0.0
    for ref in ewc._placement.refs:
        a, b = ref.matrices()
        total = total + (dense[ref.key].double() * ((b * ref.piece.scaling) @ a).square()).sum()
    return 0.5 * ewc.ewc_lambda * total


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("name", ["8bit", "factored", "uniform"])
def test_equals_dense(name: str, mode: str):
    """What is kept is that structure of the exact sum over tasks; the penalty and its gradients follow."""
    model, ewc, dense = after_tasks(name, fisher_mode=mode)
    kept = ewc.fishers
    for key, exact in dense.items():
        found = kept[key]
        if name == "8bit":
            assert isinstance(found, EightBitFisher)
            step = 2 * exact.amax(1, keepdim=True) / 255**0.5  # two roundings, between neighbouring levels
            assert bool(((found.dense() - exact).abs() <= step).all())
            continue
        assert isinstance(found, FactoredFisher)
        sums = exact.sum(1), exact.sum(0)
        if name == "uniform":
            sums = [exact.mean() * exact.numel() / size * torch.ones(size).double() for size in exact.shape]
        for part, expected in zip(found, sums, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=0.0)
    expected = penalty_of(ewc, {key: fisher.dense() for key, fisher in kept.items()})
    tight = {"rtol": 1e-5 if name == "8bit" else 1e-9, "atol": 1e-12}
    torch.testing.assert_close(ewc.penalty(), expected, check_dtype=False, **tight)
    parameters = [p for ref in ewc._placement.refs for p in ref.parameters()]
    model.zero_grad()
    ewc.add_penalty_grad_()
    for parameter, gradient in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tight)


def test_kronecker_factors():
    """G and C are sums over the tokens that have a gradient, and the penalty is that of their product."""
    model = adapted()
    ewc = EWC(model, 2.0, **STRUCTURES["kronecker"])
    x, y = data(SAMPLES)
    x_seen, dy_seen = [], []
    other = plain(model)
    other.fc.register_forward_hook(
        lambda _, args, out: (x_seen.append(args[0].detach()), out.register_hook(dy_seen.append))[1] and None
    )
    for sample in range(SAMPLES):
        F.cross_entropy(other(x[sample : sample + 1]), y[sample : sample + 1]).backward()
    rows, grads = torch.cat(x_seen).flatten(0, 1), torch.cat(dy_seen).flatten(0, 1)
    ewc.end_task(batches(x, y, 2), F.cross_entropy)
    found = ewc.fishers["fc"]
    assert isinstance(found, KroneckerFisher)
    torch.testing.assert_close(found.inputs, rows.T @ rows / (SAMPLES * TOKENS), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.outputs, grads.T @ grads / SAMPLES, rtol=1e-9, atol=1e-12)
    train(model, ewc, 1)
    total = 0.0
    for ref in ewc._placement.refs:
        (a, b), fisher = ref.matrices(), ewc.fishers[ref.key]
        delta = (b * ref.piece.scaling) @ a
        total = total + ewc.ewc_lambda / 2 * (delta.T @ fisher.outputs @ delta @ fisher.inputs).trace()
    torch.testing.assert_close(ewc.penalty(), total, rtol=1e-9, atol=1e-12)


def test_nearest_product():
    """The sum of two Kronecker products becomes the nearest one, by the singular values of its rearrangement,
    and the error is told."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, n + 2, generator=generator, dtype=torch.float64) for n in (3, 4, 3, 4)]
    g1, c1, g2, c2 = (f @ f.T for f in factors)
    first, second = {"outputs": g1, "inputs": c1}, {"outputs": g2, "inputs": c2}
    found, error = nearest_product(first, second)
    rearranged = torch.outer(g1.flatten(), c1.flatten()) + torch.outer(g2.flatten(), c2.flatten())
    values = torch.linalg.svdvals(rearranged)
    assert error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-9)
    distance = (rearranged - torch.outer(found["outputs"].flatten(), found["inputs"].flatten())).norm()
    assert float(distance / rearranged.norm()) == pytest.approx(error, rel=1e-9)
    assert all(float(torch.linalg.eigvalsh(part)[0]) >= -1e-12 for part in found.values())
    same, none = nearest_product(first, {"outputs": 2 * g1, "inputs": c1})
    torch.testing.assert_close(torch.kron(same["outputs"], same["inputs"]), 3 * torch.kron(g1, c1))
    assert none == pytest.approx(0.0, abs=1e-7)


def test_kronecker_error_recorded():
    """The first task is joined to nothing, the second with an error."""
    _, ewc, _ = after_tasks("kronecker")
    assert ewc.history[0].error == 0.0 < ewc.history[1].error < 1.0


@OTHERS
def test_function_kept(name: str):
    """Ending a task leaves the function of the model as it was."""
    model, ewc, _ = after_tasks(name)
    x, _ = data(4, seed=9)
    before = model(x)
    end(model, ewc, 2)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)


@OTHERS
def test_state_continues(name: str, tmp_path):
    """A saved state goes on in a new EWC, and copies and pickles do, to the last bit."""
    model, ewc, _ = after_tasks(name)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    other = copy.deepcopy(model)
    loaded = EWC(other, 2.0, **STRUCTURES[name])
    loaded.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    third = pickle.loads(pickle.dumps(ewc))
    assert loaded.history == ewc.history == third.history
    assert loaded.penalty().item() == ewc.penalty().item() == third.penalty().item()
    torch.manual_seed(3)
    end(model, ewc, 5)
    torch.manual_seed(3)
    end(other, loaded, 5)
    assert_same(whole(model, ewc), whole(other, loaded))


@OTHERS
def test_checkpoint_continues(name: str, tmp_path):
    """A checkpoint folder keeps the structure."""
    model, ewc, _ = after_tasks(name)
    save_pretrained(tmp_path, model, ewc)
    other = fresh()
    loaded = EWC(other, 2.0, **STRUCTURES[name])
    load_pretrained(tmp_path, other, loaded)
    assert loaded.tasks == 2
    found = loaded._state.fishers
    assert all(torch.equal(found[part], tensor) for part, tensor in ewc._state.fishers.items())
    torch.testing.assert_close(loaded.penalty(), ewc.penalty(), rtol=1e-12, atol=0.0)


@OTHERS
def test_all_or_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """A task that cannot be joined leaves everything as it was."""
    model, ewc, _ = after_tasks(name)
    x, y = data(SAMPLES, seed=7)
    ewc.estimate_fisher(batches(x, y, 2), F.cross_entropy)
    before, history = whole(model, ewc), ewc.history
    kind = type(ewc.structure)

    def failing(*args):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "joined", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            ewc.consolidate()
    assert_same(before, whole(model, ewc))
    assert ewc.history == history
    ewc.consolidate()
    assert len(ewc.history) == 3


@OTHERS
def test_not_finite(name: str):
    """NaN in a task's Fisher is refused before anything changes."""
    model, ewc, _ = after_tasks(name)
    before = whole(model, ewc)
    x, y = data(SAMPLES, seed=7)
    x[1] = torch.nan
    with pytest.raises(FisherError, match="NaN or Inf"):
        ewc.end_task(batches(x, y, 2), F.cross_entropy, check_samples=False)
    assert_same(before, whole(model, ewc))


def test_refused():
    """What a structure cannot mean or keep is refused by name."""
    model = adapted(dtype=torch.float32)
    with pytest.raises(ArgumentError, match=r"fisher: expected one of \('dense', .*got 'diagonal'"):
        EWC(model, fisher="diagonal")
    with pytest.raises(ArgumentError, match="no exact meaning otherwise"):
        EWC(model, fisher="kronecker", fisher_mode="batch")
    with pytest.raises(DtypeError, match=r"fisher='factored'.*got torch\.bfloat16"):
        EWC(model, fisher="factored", fisher_dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="fisher_dtype: expected fp32 with fisher='uniform', got '8bit'"):
        EWC(model, fisher="uniform", fisher_dtype="8bit")
    with pytest.raises(DtypeError, match=r"expected a torch\.dtype or '8bit', got '4bit'"):
        EWC(model, fisher_dtype="4bit")


@OTHERS
def test_other_structure_refused(name: str):
    """A state of another structure names what converts it, and changes nothing."""
    _, ewc, _ = after_tasks(name)
    other = EWC(adapted(), 2.0, fisher_dtype=torch.float64)
    with pytest.raises(FisherError, match=f"fisher: the state has the structure '{name}'.*convert_fisher_"):
        other.load_state_dict(ewc.state_dict())
    assert other.tasks == 0
    saved = ewc.state_dict()
    saved["tensors"] = {n: t[1:] if n.startswith("fisher.fc") else t for n, t in saved["tensors"].items()}
    with pytest.raises(FisherError, match="state: fisher of fc"):
        ewc.load_state_dict(saved)


def test_old_states():
    """A state of before there were structures is a dense one."""
    model = adapted()
    ewc = EWC(model, 2.0, fisher_dtype=torch.float64)
    end(model, ewc, 0)
    saved = ewc.state_dict()
    del saved["config"]["fisher"]
    for record in saved["config"]["history"]:
        del record["error"]
    EWC(adapted(), 2.0, fisher_dtype=torch.float64).load_state_dict(saved)


@OTHERS
def test_forgets(name: str):
    """gamma = 0 forgets what is kept, NaN and Inf too."""
    model, ewc, _ = after_tasks(name, 1)
    for tensor in ewc._state.fishers.values():
        tensor.fill_(255 if tensor.dtype == torch.uint8 else torch.inf)
    monitor = copy.deepcopy(model)
    end(model, ewc, 1, gamma=0.0)
    alone = EWC(monitor, 2.0, **STRUCTURES[name])
    end(monitor, alone, 1)
    for found, expected in zip(ewc._state.fishers.values(), alone._state.fishers.values(), strict=True):
        if name != "8bit":  # whose rounding depends on the number of the task
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def test_decays():
    """gamma scales the sums that are kept."""
    model, ewc, dense = after_tasks("factored", 1)
    exact = end(model, ewc, 1, gamma=0.5)
    for key, fisher in ewc.fishers.items():
        expected = (0.5 * dense[key] + exact[key]).sum(1)
        torch.testing.assert_close(fisher.rows, expected, rtol=1e-9, atol=0.0)


@OTHERS
def test_compiled_step(name: str):
    """A step with the penalty compiles as one graph, and kept parts stay where they are over tasks."""
    model, ewc, _ = after_tasks(name, 1)
    places = {part: tensor.data_ptr() for part, tensor in ewc._state.fishers.items()}

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y) + ewc.penalty()

    x, y = data(3, seed=4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for task in (1, 2):
        parameters = [p for ref in ewc._placement.refs for p in ref.parameters()]
        found, expected = compiled(x, y), step(x, y)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        pairs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
        for gradient, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        end(model, ewc, task)
        train(model, ewc, task)
    assert places == {part: tensor.data_ptr() for part, tensor in ewc._state.fishers.items()}
    torch.compiler.reset()


def test_drift():
    """After 100 tasks in 8 bits the Fisher has no bias, and the penalty is within 2 %."""
    generator = torch.Generator().manual_seed(0)
    structure = EWC(adapted(dtype=torch.float32), fisher_dtype="8bit").structure
    extent, kept = Extent.whole(24, 160), None
    exact = torch.zeros(24, 160)
    for task in range(100):
        share = torch.rand(24, 160, generator=generator) ** 8
        exact += share
        kept, _ = structure.joined(kept, {"": share}, Weights(1.0, 1.0, 1, task), extent)
    found = EightBitFisher(kept[""], 160).dense()
    assert abs(float((found - exact).mean() / exact.mean())) < 2e-3
    delta = torch.randn(24, 4, generator=generator) @ torch.randn(4, 160, generator=generator)
    penalty, truth = ((f * delta.square()).sum() for f in (found, exact))
    assert abs(float(penalty / truth) - 1.0) < 2e-2


def test_own_structure():
    """A structure of one's own is used as the named ones are."""

    class Columns(Factored):
        """Only column sums count."""

        name = "columns"

        def value(self, parts, columns):
            return FactoredFisher(torch.ones_like(parts["rows"]), parts["columns"])

    assert issubclass(Columns, Structure)
    model = adapted()
    ewc = EWC(model, 2.0, fisher=Columns(), fisher_dtype=torch.float64)
    end(model, ewc, 0)
    train(model, ewc, 1)
    assert ewc.penalty().item() > 0.0 and ewc.state_dict()["config"]["fisher"] == "columns"


class ColumnSquares:
    """Sums of one's own: column sums of the squares, from the gradient of every sample."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    def add(self, term: fe.structures.Term, mode: str, weight: float) -> None:
        assert mode == "sample" and term.rows.start == term.row
        for x, dy in term.pieces():
            gradients = torch.einsum("nto,nti->noi", dy, x.to(dy.dtype))
            self.columns.add_(gradients.square().sum((0, 1)), alpha=weight)


class Columnwise(fe.Structure):
    """F[i, j] is the mean of column j of the dense F, written from public names alone."""

    name = "columnwise"
    modes = ("sample",)
    by_rows = frozenset({"rows"})

    def sum_shapes(self, extent: fe.structures.Extent) -> dict[str, tuple[int, ...]]:
        return {"columns": (extent.columns,)}

    def kept_shapes(self, extent: fe.structures.Extent) -> dict[str, tuple[int, ...]]:
        return {"rows": (extent.count,), "columns": (extent.columns,)}

    def sums(self, parts: Mapping[str, Tensor]) -> fe.structures.Sums:
        return ColumnSquares(parts["columns"])

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: fe.structures.Weights,
        extent: fe.structures.Extent,
    ) -> tuple[fe.structures.Parts, float]:
        return self.level(weights.joined(old and old["columns"], task["columns"]), extent), 0.0

    def level(self, columns: Tensor, extent: fe.structures.Extent) -> fe.structures.Parts:
        return {"rows": (columns.sum() / extent.rows).expand(extent.count).clone(), "columns": columns}

    def value(self, parts: Mapping[str, Tensor], columns: int) -> fe.structures.Fisher:
        return FactoredFisher(parts["rows"], parts["columns"])

    def of_dense(self, fisher: Tensor, extent: fe.structures.Extent) -> fe.structures.Parts:
        return self.level(fisher.sum(0), extent)


def test_structure_from_public_names():
    """A structure with sums of its own keeps the column means of the dense Fisher, over tasks with a gamma,
    in a state and in the penalty."""
    model = adapted()
    own = EWC(model, 2.0, gamma=0.5, fisher=Columnwise(), fisher_dtype=torch.float64)
    first, second = end(model, own, 0), end(model, own, 1)
    dense = {key: 0.5 * first[key] + second[key] for key in KEYS}
    means = {key: fisher.mean(0).expand_as(fisher) for key, fisher in dense.items()}
    for key, expected in means.items():
        torch.testing.assert_close(own.fishers[key].dense(), expected, rtol=1e-9, atol=1e-15)
    randomise(model)
    assert own.penalty().item() > 0.0
    torch.testing.assert_close(own.penalty(), penalty_of(own, means), rtol=1e-9, atol=0.0)
    other = EWC(model, 2.0, gamma=0.5, fisher=Columnwise(), fisher_dtype=torch.float64)
    other.load_state_dict(own.state_dict())
    assert torch.equal(other.penalty(), own.penalty())
    model = adapted()
    converted = EWC(model, 2.0, fisher_dtype=torch.float64)
    exact = end(model, converted, 0)
    converted.convert_fisher_(Columnwise(), torch.float64)
    for key, fisher in exact.items():
        found = converted.fishers[key].dense()
        torch.testing.assert_close(found, fisher.mean(0).expand_as(fisher), rtol=1e-9, atol=1e-15)
