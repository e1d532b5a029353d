# SPDX-License-Identifier: Apache-2.0
"""What a Fisher pass checks of the loss that a model computes, and of the order of the data."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CLASSES, adapted, assert_same, batches, data, snapshot, squares
from torch import nn

from fused_ewclora.errors import FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.model_loss import ModelLoss

EPS = torch.finfo(torch.float64).eps
IGNORED = -100


class WithLoss(nn.Module):
    """transformers style: model(**batch) -> logits and a loss of them."""

    def __init__(self, loss, **options):
        super().__init__()
        self.inner, self.loss = adapted(**options), loss

    def forward(self, x, labels):
        logits = self.inner(x)
        return {"logits": logits, "loss": self.loss(logits, labels)}


def mappings(x, labels, size):
    return [{"x": a, "labels": b} for a, b in zip(x.split(size), labels.split(size), strict=True)]


def real(samples, seed=1):
    """Targets of a regression."""
    x, _ = data(samples, seed)
    return x, torch.randn(samples, CLASSES, dtype=torch.float64)


MEANS = {
    "squares": lambda o, y: F.mse_loss(o, y),
    "binary": lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid()),
    "with a constant": lambda o, y: F.mse_loss(o, y) + 100.0,
    "huber": lambda o, y: F.huber_loss(o, y),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_of_model(name, size):
    """A loss of the model that is a mean over samples is taken as it is, without a warning."""
    x, y = real(6)
    ewc = EWC(WithLoss(MEANS[name]), fisher_dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.end_task(mappings(x, y, size))
    losses = [lambda m, n=n: MEANS[name](m(x[n : n + 1]), y[n : n + 1]) for n in range(6)]
    for key, value in squares(adapted(), losses, [1 / 6] * 6).items():
        error = float((ewc.fishers[f"inner.{key}"] - value).abs().max())
        assert error <= 1e3 * EPS * float(value.max()), key


def per_box(output, target):
    """Normalised by what a detector finds, here the positive entries of all targets."""
    return ((output - target) ** 2).sum() / (target > 0).sum().clamp(min=1)


OTHERS = {
    "sum": (lambda o, y: F.mse_loss(o, y, reduction="sum"), r"looks like a sum.*reduction='sum'"),
    "boxes": (per_box, r"mean of the losses of the samples.*normalisation over the batch"),
    "pairs": (lambda o, y: (o @ o.T).logsumexp(1).mean(), "depends on the other samples"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_of_model_refused(name, dtype):
    """A loss of the model that is no mean over samples is refused, and nothing changes."""
    loss, message = OTHERS[name]
    x, y = real(6)
    model = WithLoss(loss, dtype=dtype)
    ewc = EWC(model, fisher_dtype=dtype)
    loader = mappings(x.to(dtype), y.to(dtype), 3)
    before = snapshot(model)
    with pytest.raises(FisherError, match=message):
        ewc.estimate_fisher(loader)
    assert_same(before, snapshot(model))
    assert all(layer.fisher_capture is None for layer in ewc.layers.values())
    ewc.estimate_fisher(loader, check_samples=False)
    if name == "sum":
        ewc.estimate_fisher(loader, reduction="sum")


def test_model_check_leaves_no_trace():
    """The comparison adds nothing to the Fisher of the pass."""
    x, y = real(6)
    fishers = []
    for check in (False, True):
        ewc = EWC(WithLoss(F.mse_loss), fisher_dtype=torch.float64)
        ewc.end_task(mappings(x, y, 3), check_samples=check)
        fishers.append(ewc.fishers)
        assert ewc.history[0].samples == 6
    assert all(torch.equal(fishers[0][key], value) for key, value in fishers[1].items())


def test_sampled_without_classes():
    """Sampled labels are refused where the loss of the model is no cross entropy."""
    x, y = real(4)
    with pytest.raises(FisherError, match="not a cross entropy"):
        EWC(WithLoss(F.mse_loss)).estimate_fisher(mappings(x, y, 2), labels="sampled")


class Objects(nn.Module):
    """Its outputs are of a class that the library does not know."""

    def __init__(self):
        super().__init__()
        self.inner = adapted()

    def forward(self, x):
        return SimpleNamespace(scores=self.inner(x))


def scores(output, target):
    return F.cross_entropy(output.scores, target)


def test_objects_as_output():
    """Outputs that cannot be cut are checked by forward passes of single samples."""
    x, y = data(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EWC(Objects()).estimate_fisher(batches(x, y, 3), scores)
    y[1] = IGNORED
    with pytest.raises(FisherError, match=r"mean of the losses of the samples.*ignored"):
        EWC(Objects()).estimate_fisher(batches(x, y, 6), scores, check_samples=True)


def test_sequence_first_output():
    """So are outputs whose samples are not first."""
    x, y = data(6)
    forward = lambda m, b: (m(b[0])[None], b[1])  # noqa: E731
    EWC(adapted()).estimate_fisher([(x, y)], lambda o, t: F.cross_entropy(o[0], t), forward=forward)
    with pytest.raises(FisherError, match="looks like a sum"):
        EWC(adapted()).estimate_fisher(
            [(x, y)], lambda o, t: F.cross_entropy(o[0], t) * len(t), forward=forward
        )


def test_unchecked_loss_is_told():
    """A loss that cannot be checked is told once; the argument silences it."""
    x, y = data(6)
    loader, options = batches(x, y, 3), {"batch_size_fn": lambda batch: 3}
    with pytest.warns(UserWarning, match=r"not checked.*two samples cut from a batch count as 3") as told:
        EWC(Objects()).estimate_fisher(loader, scores, **options)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EWC(Objects()).estimate_fisher(loader, scores, check_samples=False, **options)


def test_loss_without_singles():
    """A loss that needs several samples is told."""
    x, y = data(6)

    def pairs(output, target):
        assert len(target) > 1, "needs pairs"
        return F.cross_entropy(output, target)

    with pytest.warns(UserWarning, match=r"not checked.*AssertionError: needs pairs"):
        EWC(adapted()).estimate_fisher([(x, y)], pairs)


@pytest.mark.parametrize("labels", ["empirical", "exact"])
def test_loss_not_finite(labels):
    """Losses that are not finite are reported with their batch, unless check_finite is off."""
    x, y = data(8)
    x[5] = math.nan
    with pytest.raises(FisherError, match=r"loss: expected finite values, got NaN or Inf, in batch 3"):
        EWC(adapted()).estimate_fisher(batches(x, y, 2), F.cross_entropy, labels=labels)
    EWC(adapted(), check_finite=False).estimate_fisher(batches(x, y, 2), F.cross_entropy, labels=labels)


def told_of_order(x, y, size, mode="batch", **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        EWC(adapted(), fisher_mode=mode).estimate_fisher(batches(x, y, size), F.cross_entropy, **options)
    return [str(w.message) for w in told]


def test_classes_in_order():
    """Mode "batch" warns once when every batch has one class."""
    x, _ = data(8)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    (message,) = told_of_order(x, y, 3)
    assert "single class" in message and "shuffle the loader" in message
    assert len(told_of_order(x[:7], y[:7], 3)) == 1  # a last batch of one sample tells nothing
    quiet = {
        "sample mode": told_of_order(x, y, 3, "sample"),
        "one class": told_of_order(x, torch.zeros_like(y), 3),
        "one batch": told_of_order(x[:3], y[:3], 3),
        "mixed": told_of_order(x, y, 4),
        "single samples": told_of_order(x, y, 1),
        "sampled": told_of_order(x, y, 3, labels="sampled"),
    }
    assert not any(quiet.values()), quiet


def sequences():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    return logits, torch.randint(0, 4, (3, 5))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("form", ["aligned", "shifted"])
def test_form_of_loss(form, uniform):
    """The form of a loss is found from its value, and from its gradient where uniform logits hide it."""
    logits, targets = sequences()
    logits = (logits * (not uniform)).requires_grad_()
    used = (logits[:, :-1], targets[:, 1:]) if form == "shifted" else (logits, targets)
    loss = F.cross_entropy(used[0].flatten(0, 1), used[1].flatten())
    assert ModelLoss().form(loss, logits, targets) == form


def test_undecided_form():
    """Batches without counted targets decide nothing; other losses have no form."""
    logits, targets = sequences()
    decided, nothing = ModelLoss(), torch.full_like(targets, IGNORED)
    assert decided.form(torch.tensor(math.nan), logits, nothing) == "aligned"
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    assert decided.form(loss, logits, targets) == "shifted"
    assert decided.form(torch.tensor(math.nan), logits, nothing) == "shifted"
    for other in (targets.double(), targets + 9, targets[:, :3], targets > 1, None):
        assert ModelLoss().form(loss, logits, other) is None
    assert ModelLoss().form(loss + 0.1, logits, targets) is None


def test_changing_loss():
    """A loss of the model that is another one in a later batch is refused."""

    def changing(output, target):
        return F.cross_entropy(output, target) * (1 if (target < 3).all() else 2)

    x, _ = data(6)
    y = torch.tensor([0, 1, 2, 1, 3, 3])
    with pytest.raises(FisherError, match=r"is not any more.*batch 3"):
        EWC(WithLoss(changing)).estimate_fisher(mappings(x, y, 2))
