# SPDX-License-Identifier: Apache-2.0
"""The protocol of IEL and ITA, step by step: mixtures, tuned heads, alignment, Fishers, decoupled steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_clusters import CPU, a_run, interrupted, problem
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fused_ewclora as fe
from benchmarks.continual import protocols, tuned_heads
from benchmarks.continual.configuration import Run
from benchmarks.continual.mixtures import SMALLEST_VARIANCE, Mixture
from benchmarks.continual.run import State, execute, learn
from benchmarks.continual.stream import Arrays, Stream, loader
from benchmarks.continual.tuned_heads import FLOOR, TunedHeads

STRENGTH = {"IEL": "beta", "ITA": "alpha"}


def tuned_run(method: str = "ITA", variant: str = "official", strength: float = 0.5, **options: Any) -> Run:
    settings = {
        "kind": "tuned-heads", "req_weight_cls": 0.1, "num_samples_align_pretuning": 16,
        "num_epochs_align_pretuning": 2, **options,
    }  # fmt: skip
    return a_run(method, options={STRENGTH[method]: strength, "variant": variant}, protocol=settings)


def begun(run: Run, number: int) -> tuple[State, TunedHeads, Any]:
    """A run whose task `number` has begun, before what the protocol does, and the batches of the task."""
    state = State(run, problem(), CPU)
    for earlier in range(number):
        learn(state, earlier)
    state.model.begin_task(state.tasks[number])
    state.method.begin_task(number)
    assert isinstance(state.protocol, TunedHeads)
    return state, state.protocol, loader(state.tasks[number].train, 8, state.order)


def copies(heads: list[nn.Linear]) -> list[Tensor]:
    return [p.detach().clone() for head in heads for p in head.parameters()]


def first_features(state: State, number: int) -> tuple[Tensor, Tensor]:
    """Of all examples of a task, under the weights before all tasks."""
    inputs, labels = state.tasks[number].train[:]
    with torch.no_grad():
        return problem().backbone(inputs), labels


def test_mixture_density() -> None:
    """The density of a mixture is that of torch.distributions, its draws have its moments."""
    mixture = Mixture(
        torch.tensor([0.25, 0.75]),
        torch.tensor([[0.0, 3.0], [5.0, -1.0]]),
        torch.tensor([[1.0, 4.0], [0.25, 2.0]]),
    )
    components = Independent(Normal(mixture.means, mixture.variances.sqrt()), 1)
    expected = MixtureSameFamily(Categorical(mixture.weights), components)
    torch.manual_seed(0)
    x = mixture.draw(40000)
    found = (mixture.log_densities(x[:50]) + mixture.weights.log()).logsumexp(1)
    torch.testing.assert_close(found, expected.log_prob(x[:50]), rtol=1e-5, atol=1e-5)
    # Five standard errors, with the fourth moment of a sum of Gaussians below 10 times the squared variance.
    error = 5 * expected.variance.sqrt() / len(x) ** 0.5
    assert bool(((x.mean(0) - expected.mean).abs() < error).all())
    assert bool(((x.var(0) - expected.variance).abs() < 15 * expected.variance / len(x) ** 0.5).all())


def test_mixture_fit() -> None:
    """One component has the moments of the points; two far apart are found, whatever the order of points."""
    torch.manual_seed(1)
    points = torch.cat([torch.randn(300, 3), 10 + 0.5 * torch.randn(100, 3)])[torch.randperm(400)]
    one = Mixture.fit(points, 1, 10)
    torch.testing.assert_close(one.means[0], points.mean(0))
    torch.testing.assert_close(one.variances[0], points.var(0, correction=0) + SMALLEST_VARIANCE)
    two = Mixture.fit(points, 2, 100)
    far = points[:, 0] > 5
    order = two.means[:, 0].argsort()
    torch.testing.assert_close(two.weights[order], torch.tensor([0.75, 0.25]))
    for k, group in zip(order, (points[~far], points[far]), strict=True):
        torch.testing.assert_close(two.means[k], group.mean(0))
        torch.testing.assert_close(two.variances[k], group.var(0, correction=0) + SMALLEST_VARIANCE)


def test_mixture_climbs() -> None:
    """Further iterations never make the points less likely, also where components overlap."""
    torch.manual_seed(2)
    points = torch.cat([torch.randn(60, 2), torch.randn(60, 2) + 1.0])

    def likelihood(iterations: int) -> float:
        torch.manual_seed(3)  # the same centres
        fitted = Mixture.fit(points, 3, iterations)
        return float((fitted.log_densities(points) + fitted.weights.log()).logsumexp(1).mean())

    values = [likelihood(n) for n in (1, 2, 4, 8, 50)]
    assert all(b >= a - 1e-6 for a, b in pairwise(values)) and values[-1] > values[0]


def test_mixture_of_few_points() -> None:
    """Fewer points than components are components themselves; equal ones are no trouble, none is refused."""
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    fitted = Mixture.fit(points, 5, 10)
    assert sorted(fitted.means[:, 0].tolist()) == [1.0, 3.0]
    assert bool((fitted.variances == SMALLEST_VARIANCE).all())
    same = Mixture.fit(torch.ones(4, 2), 3, 10)
    assert bool(torch.isfinite(same.draw(20)).all()) and float(same.draw(20).std()) < 0.01
    with pytest.raises(fe.ArgumentError, match="points: expected at least one"):
        Mixture.fit(points[:0], 5, 10)


def test_tuned_head_is_plain_training() -> None:
    """Without alignment the tuned head of a task is plain SGD on features of the weights before all tasks,
    whatever earlier tasks have learned; other tuned heads stay."""
    state, protocol, batches = begun(tuned_run("IEL", num_epochs_align_pretuning=0), 1)
    earlier, rate = copies(protocol.tuned), protocol.learning_rate_pretuning
    generator = state.order.get_state()
    torch.manual_seed(7)
    protocol.learning_rate_pretuning = 0.0
    protocol.before_task(1, batches, CPU)
    weight, bias = (p.requires_grad_() for p in copies(protocol.tuned[-1:]))
    assert float(weight.detach().abs().max()) > 0.0 and not bool(bias.any())
    protocol.tuned.pop()
    del protocol.mixtures[-3:]
    state.order.set_state(generator)
    torch.manual_seed(7)
    protocol.learning_rate_pretuning = 100 * rate
    protocol.before_task(1, batches, CPU)
    x, y = first_features(state, 1)
    adapted = state.model.backbone(state.tasks[1].train.inputs)  # type: ignore[attr-defined]
    assert float((adapted - x).detach().abs().max()) > 0.01, "the case must have task vectors"
    for _ in range(3):
        F.cross_entropy(x @ weight.T + bias, y).backward()
        with torch.no_grad():
            for parameter in (weight, bias):
                parameter -= 100 * rate * parameter.grad
                parameter.grad = None
    torch.testing.assert_close(
        copies(protocol.tuned[-1:]), [weight.detach(), bias.detach()], rtol=1e-4, atol=1e-6
    )
    assert all(torch.equal(a, b) for a, b in zip(copies(protocol.tuned[:1]), earlier, strict=True))


def test_mixtures_of_classes() -> None:
    """Mixtures are fitted to the features of each class of the task alone."""
    state, protocol, batches = begun(tuned_run(n_components=1), 1)
    protocol.before_task(1, batches, CPU)
    x, y = first_features(state, 1)
    assert len(protocol.mixtures) == 5
    for label in range(3):
        torch.testing.assert_close(protocol.mixtures[2 + label].means[0], x[y == label].mean(0))


def test_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch draws all classes so far equally often; a step is one of SGD on the cross entropy of logits
    of length 10, at a rate that falls as a cosine, and moves the heads of all tasks."""
    _, protocol, batches = begun(tuned_run(batch_size_align_pretuning=80), 1)
    seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    whole: Callable[..., Any] = tuned_heads.shuffled

    def recorded(features: Tensor, labels: Tensor, batch_size: int) -> Any:
        for x, y in whole(features, labels, batch_size):
            if len(labels) == 80:  # 5 classes, 16 draws each
                seen.append((x, y, copies(protocol.tuned)))
            yield x, y

    monkeypatch.setattr(tuned_heads, "shuffled", recorded)
    protocol.before_task(1, batches, CPU)
    assert len(seen) == 2 + 5 and not any(p.requires_grad for h in protocol.tuned for p in h.parameters())
    befores = [heads for *_, heads in seen]
    for step, (x, y, before) in enumerate(seen):
        assert y.bincount().tolist() == [16] * 5
        assert step == 0 or not torch.equal(x, seen[0][0])
        parameters = [p.requires_grad_() for p in before]
        logits = torch.cat([x @ w.T + b for w, b in zip(parameters[::2], parameters[1::2], strict=True)], 1)
        loss = F.cross_entropy(10 * logits / logits.norm(dim=1, keepdim=True), y)
        rate = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * step / 7))) / 2
        gradients = torch.autograd.grad(loss, parameters)
        after = befores[step + 1] if step + 1 < len(seen) else copies(protocol.tuned)
        for p, gradient, new in zip(parameters, gradients, after, strict=True):
            torch.testing.assert_close(new.detach(), (p - rate * gradient).detach(), rtol=1e-4, atol=1e-6)
            assert bool(gradient.any())


def exact_fisher(backbone: nn.Module, inputs: Any, heads: list[Tensor]) -> dict[str, Tensor]:
    """The mean over examples of sum_k p_k (d log p_k / dW)^2, one example and class at a time."""
    weight, bias = torch.cat(heads[::2]), torch.cat(heads[1::2])
    names = {"backbone.up": backbone.up.weight, "backbone.down": backbone.down.weight}
    total = {name: torch.zeros_like(w) for name, w in names.items()}
    count = len(inputs[0])
    for n in range(count):
        log_p = (backbone(tuple(v[n : n + 1] for v in inputs)) @ weight.T + bias).log_softmax(1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, list(names.values()), retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += float(value.detach().exp()) * gradient.square() / count
    return total


def test_fisher_over_all_classes() -> None:
    """The method's Fisher is that of the first weights under the tuned heads of all classes so far."""
    state, protocol, batches = begun(tuned_run("IEL", "paper"), 0)
    backbone = problem().backbone
    expected: dict[str, Tensor] = {}
    samples = 0
    for number in range(2):
        if number:
            state.model.begin_task(state.tasks[1])
            state.method.begin_task(1)
            batches = loader(state.tasks[1].train, 8, state.order)
        protocol.before_task(number, batches, CPU)
        heads = state.model.heads
        protocol.prepare(batches)
        assert state.model.heads is heads and len(heads) == number + 1  # type: ignore[arg-type]
        inputs, labels = state.tasks[number].train[:]
        for name, fisher in exact_fisher(backbone, inputs, copies(protocol.tuned)).items():
            earlier = samples * expected.get(name, torch.zeros(()))
            expected[name] = (earlier + len(labels) * fisher) / (samples + len(labels))
        samples += len(labels)
        for name, fisher in state.method.fishers.items():  # type: ignore[attr-defined]
            torch.testing.assert_close(fisher, expected[name], rtol=1e-3, atol=1e-7)
        state.method.end_task(batches)


@pytest.mark.parametrize("method", ["IEL", "ITA"])
def test_fisher_of_head(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F_h is the mean over draws of sum_k p_k (d log p_k / dh)^2, plus 1e-5: IEL draws earlier classes."""
    _, protocol, batches = begun(tuned_run(method), 0)
    drawn: list[Tensor] = []
    draw = Mixture.draw
    monkeypatch.setattr(Mixture, "draw", lambda self, n: drawn.append(draw(self, n)) or drawn[-1])
    protocol.before_task(0, batches, CPU)
    assert protocol._fisher is not None
    first = protocol._fisher[0]
    assert bool((first == FLOOR).all()) == (method == "IEL") and bool((first >= FLOOR).all())
    _, protocol, batches = begun(tuned_run(method), 1)
    protocol.before_task(1, batches, CPU)
    points = torch.cat(drawn[-2:] if method == "IEL" else drawn[-5:])
    heads = [p.requires_grad_() for p in copies(protocol.tuned)]
    total = [torch.zeros_like(p) for p in heads[2:]]
    for x in points:
        log_p = torch.cat([x @ w.T + b for w, b in zip(heads[::2], heads[1::2], strict=True)]).log_softmax(0)
        for value in log_p:
            gradients = torch.autograd.grad(value, heads[2:], retain_graph=True)
            for sums, gradient in zip(total, gradients, strict=True):
                sums += float(value.detach().exp()) * gradient.square() / len(points)
    assert protocol._fisher is not None
    for found, expected in zip(protocol._fisher, total, strict=True):
        torch.testing.assert_close(found, expected + FLOOR, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("clip", [100.0, 1e-3, None])
def test_step(variant: str, clip: float | None) -> None:
    """ "official": parameters move along the penalties' gradients, each clipped, and gradients are those of
    the loss; "paper": gradients are those of the sum, and nothing moves."""
    run = tuned_run("ITA", variant, strength=2.0, clip_grad=clip, simple_reg_weight_cls=0.03)
    state, protocol, batches = begun(run, 1)
    protocol.before_task(1, batches, CPU)
    protocol.prepare(batches)
    trained = {n: p for n, p in state.model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p += 0.3 * torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in trained.items()}
    x, y = state.tasks[1].train[:]
    loss, own = state.model.loss(state.model(x), y), state.method.penalty()
    head, tuned = state.model.heads[-1], protocol.tuned[-1]  # type: ignore[index]
    fisher_w, fisher_b = protocol._fisher  # type: ignore[misc]
    dw, db = head.weight - tuned.weight, head.bias - tuned.bias
    of_head = 0.1 * ((fisher_w * dw**2).sum() + (fisher_b * db**2).sum()) + 0.03 * (
        (dw**2).sum() + (db**2).sum()
    )
    of_loss = torch.autograd.grad(loss, list(trained.values()))
    of_penalty = torch.autograd.grad(own + of_head, list(trained.values()))
    assert all(bool(g.any()) for g in (*of_loss, *of_penalty))
    found, penalty = protocol.backward(x, y, 0.25)
    torch.testing.assert_close(found.detach(), loss.detach())
    torch.testing.assert_close(penalty.detach(), (own + of_head).detach())
    for (name, p), g, h in zip(trained.items(), of_loss, of_penalty, strict=True):
        if variant == "paper":
            assert torch.equal(p, before[name])
            torch.testing.assert_close(p.grad, g + h, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(p.grad, g)
            factor = 1.0 if clip is None else min(clip / (float(h.norm()) + 1e-6), 1.0)
            assert (factor < 1.0) == (clip == 1e-3)
            torch.testing.assert_close(p.detach(), before[name] - 0.25 * factor * h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("method", STRENGTH)
def test_resume_identical(method: str, variant: str, tmp_path: Path) -> None:
    """An interrupted run, once resumed, ends as if it had never been interrupted."""
    run, file = tuned_run(method, variant), tmp_path / "state.pt"
    whole = execute(run, problem(), CPU)
    interrupted(run, problem(), file)
    torch.manual_seed(99)  # whatever else the process has drawn
    resumed = execute(run, problem(), CPU, file)
    assert resumed["matrices"] == whole["matrices"]
    for name in ("loss", "penalty", "state_bytes"):
        assert [t[name] for t in resumed["tasks"]] == [t[name] for t in whole["tasks"]], name
    assert whole["metrics"]["class_incremental"]["A_last_sample_weighted"] > 100 / 7


def test_state_counted() -> None:
    """The bytes of a run's record have tuned heads and mixtures, which grow with the classes."""
    plain = execute(a_run("ITA", options={"alpha": 0.5, "variant": "official"}), problem(), CPU)
    tuned = execute(tuned_run(), problem(), CPU)
    more = [b["state_bytes"] - a["state_bytes"] for a, b in zip(plain["tasks"], tuned["tasks"], strict=True)]
    # A class has a row of a head, and five components: a weight, 10 means and 10 variances each.
    of_class = 4 * (11 + 5 * 21)
    newest = [4 * 11 * classes for classes in (2, 3, 2)]  # the Fisher of the newest head
    assert more == [2 * of_class + newest[0], 5 * of_class + newest[1], 7 * of_class + newest[2]]


def test_labels_of_data() -> None:
    """Empirical Fishers take the labels of the data as classes of their task."""
    state, protocol, batches = begun(tuned_run("IEL", "paper"), 1)
    state.method.labels = "empirical"  # type: ignore[attr-defined]
    protocol.before_task(1, batches, CPU)
    inputs, labels = state.tasks[1].train[:]
    expected = F.cross_entropy(protocol._logits(first_features(state, 1)[0]), labels + 2)
    losses = []

    def check(_: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        with torch.no_grad():
            losses.append(loss(state.model(inputs), labels))

    state.method.prepare = check  # type: ignore[assignment]
    with state.method.pretrained():  # type: ignore[attr-defined]
        protocol.prepare(batches)
    torch.testing.assert_close(losses, [expected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs_pretuning": -1}, "num_epochs_pretuning: expected an integer >= 0, got -1"),
        ({"num_samples_align_pretuning": 0}, "num_samples_align_pretuning: expected an integer >= 1, got 0"),
        (
            {"batch_size_align_pretuning": 1.5},
            "batch_size_align_pretuning: expected an integer.*got 1.5",
        ),
        (
            {"num_epochs_align_pretuning": True},
            "num_epochs_align_pretuning: expected an integer.*got True",
        ),
        ({"n_components": 0}, "n_components: expected an integer >= 1, got 0"),
        ({"lr_align_pretuning": "fast"}, "lr_align_pretuning: expected a finite number >= 0.*'fast'"),
        ({"learning_rate_pretuning": -1.0}, "learning_rate_pretuning: expected a finite number"),
        ({"req_weight_cls": -0.1}, "req_weight_cls: expected a finite number"),
        ({"simple_reg_weight_cls": float("nan")}, "simple_reg_weight_cls: expected a finite number"),
        ({"clip_grad": -1}, "clip_grad: expected a finite number"),
        ({"epochs": 3}, "unexpected keyword argument 'epochs'"),
    ],
)
def test_bad_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(
        fe.ArgumentError, match=f"protocol: .*{message}" if "protocol" not in message else message
    ):
        protocols.make("ITA", {"kind": "tuned-heads", **options})


def test_others_refused() -> None:
    """Other methods, and a class without examples."""
    with pytest.raises(fe.ArgumentError, match="the method IEL or ITA, got Heads and LoRA"):
        State(a_run("LoRA", protocol={"kind": "tuned-heads"}), problem(), CPU)
    found = problem()
    data = found.stream.tasks[0].train
    assert isinstance(data, Arrays)
    one = data.labels == 0
    lacking = replace(
        found.stream.tasks[0], train=Arrays(tuple(v[one] for v in data.inputs), data.labels[one])
    )
    with pytest.raises(fe.ArgumentError, match="task 0: class 1 has no training example"):
        execute(tuned_run(), replace(found, stream=Stream("lacking", (lacking,))), CPU)


def test_strength_of_heads() -> None:
    """Without a weight of their own, heads have the strength of the method."""
    for method, strength in (("IEL", 0.7), ("ITA", 0.3)):
        state = State(tuned_run(method, strength=strength, req_weight_cls=None), problem(), CPU)
        assert state.protocol.req_weight_cls == strength  # type: ignore[attr-defined]
