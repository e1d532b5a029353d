# SPDX-License-Identifier: Apache-2.0
"""The Fisher of a whole model against gradients taken one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CLASSES, KEYS, adapted, assert_same, batches, data, layers, snapshot, squares
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import FisherError
from fused_ewclora.ewc import estimation
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.inject import inject

EPS = torch.finfo(torch.float64).eps


def consolidated(model, loader, loss_fn=F.cross_entropy, mode="sample", dtype=torch.float64, **options):
    """The Fisher that an estimate and a consolidation leave."""
    ewc = EWC(model, fisher_mode=mode, fisher_dtype=dtype)
    ewc.end_task(loader, loss_fn, **options)
    assert set(ewc.fishers) == set(KEYS)
    return ewc.fishers


def assert_close(actual, expected, eps=EPS):
    """Sums of a few hundred products whose gradients passed through about 10 layers: 1e3 roundings of the
    largest entry."""
    for key, value in expected.items():
        tolerance = 1e3 * eps * float(value.abs().max())
        error = float((actual[key] - value).abs().max())
        assert error <= tolerance, f"{key}: error {error:.3e} > {tolerance:.3e}"


def oracle(model, x, y):
    """(1/N) sum_n (d loss_n)^2."""
    losses = [lambda m, n=n: F.cross_entropy(m(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
    return squares(model, losses, [1 / len(x)] * len(x))


@given(samples=st.integers(1, 7), size=st.integers(1, 7), seed=st.integers(0, 2**20))
def test_empirical_any_batching(samples, size, seed):
    """The empirical Fisher is the mean of squared sample gradients for any batching."""
    model, (x, y) = adapted(seed), data(samples, seed + 1)
    expected = oracle(model, x, y)
    assert_close(consolidated(model, batches(x, y, size)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_low_precision_fp64(dtype, mode):
    """x and dy carry the rounding of the model; squares and sums are fp32."""
    x, y = data(6, dtype=dtype)
    model = adapted(dtype=dtype)
    wide = adapted(dtype=dtype).double()
    expected = consolidated(wide, batches(x.double(), y, 4), mode=mode)
    actual = consolidated(model, batches(x, y, 4), mode=mode, dtype=torch.float32)
    for key in KEYS:
        # About 10 roundings on the way to dy, doubled by the square, of entries up to the largest.
        tolerance = 20 * torch.finfo(dtype).eps * float(expected[key].max())
        assert actual[key].dtype == torch.float32
        assert float((actual[key] - expected[key]).abs().max()) <= tolerance, key


@given(order=st.permutations(range(6)))
def test_order_invariant(order):
    """The Fisher is invariant to the order of the samples."""
    (x, y), order = data(6), torch.tensor(order)
    one = consolidated(adapted(), batches(x, y, 4))
    two = consolidated(adapted(), batches(x[order], y[order], 4))
    assert_close(one, two)


def test_sum_reduced_loss():
    """A loss reduced by sum gives the same Fisher."""
    x, y = data(7)
    loss = lambda output, target: F.cross_entropy(output, target, reduction="sum")  # noqa: E731
    assert_close(consolidated(adapted(), batches(x, y, 3), loss, reduction="sum"), oracle(adapted(), x, y))


def test_batch_mode_official():
    """sum_b (n_b / N) (mean gradient of b)^2."""
    x, y = data(7)
    parts = batches(x, y, 3)
    losses = [lambda m, x=x, y=y: F.cross_entropy(m(x), y) for x, y in parts]
    expected = squares(adapted(), losses, [len(part[1]) / 7 for part in parts])
    assert_close(consolidated(adapted(), parts, mode="batch"), expected)


def test_batch_mode_of_a_sum():
    """Batch mode divides the gradient of a loss that sums by the samples of its batch."""
    x, y = data(7)
    loss = lambda output, target: F.cross_entropy(output, target, reduction="sum")  # noqa: E731
    expected = consolidated(adapted(), batches(x, y, 3), mode="batch")
    assert_close(consolidated(adapted(), batches(x, y, 3), loss, mode="batch", reduction="sum"), expected)


def test_batch_size_one():
    """At batch size one, both modes agree."""
    x, y = data(5)
    parts = batches(x, y, 1)
    assert_close(consolidated(adapted(), parts, mode="batch"), consolidated(adapted(), parts))


def test_batch_law_expectation():
    """E F_batch = F_sample / n for sampled labels, where the expected gradient is exactly 0."""
    x, _ = data(4)
    generator = torch.Generator().manual_seed(3)
    loader = [(x, None)] * 600
    sampled = {"labels": "sampled", "generator": generator}
    batch = consolidated(adapted(), loader, None, mode="batch", **sampled)
    exact = consolidated(adapted(), [(x, None)], None, labels="exact")
    ratio = sum(float(f.sum()) for f in exact.values()) / sum(float(f.sum()) for f in batch.values())
    # A squared mean of 4 gradients has a relative deviation of about sqrt 2; 600 draws bring it to 0.06.
    assert abs(ratio / 4 - 1) < 5 * math.sqrt(2 / 600), ratio


def test_exact_labels_expectation():
    """Exact labels give the expectation over classes."""
    x, y = data(5)
    model = adapted()
    p = model(x).softmax(-1).detach()
    losses, weights = [], []
    for n in range(5):
        for c in range(CLASSES):
            losses.append(lambda m, n=n, c=c: -m(x[n : n + 1]).log_softmax(-1)[0, c])
            weights.append(float(p[n, c]) / 5)
    actual = consolidated(model, batches(x, y, 2), None, labels="exact")
    assert_close(actual, squares(adapted(), losses, weights))


def test_exact_masked_classes():
    """Exact labels ignore classes masked by minus infinity."""
    x, y = data(5)
    mask = torch.tensor([0.0, -math.inf, 0.0, -math.inf], dtype=torch.float64)
    exact = {"loss_fn": None, "labels": "exact"}
    masked = consolidated(adapted(), batches(x, y, 2), **exact, logits_fn=lambda logits: logits + mask)
    kept = consolidated(adapted(), batches(x, y, 2), **exact, logits_fn=lambda logits: logits[:, ::2])
    assert_close(masked, kept)


def test_sampled_labels_generator():
    """Sampled labels are drawn from the model and repeat with the generator."""
    x, y = data(6)
    model, parts = adapted(), batches(x, y, 6)
    generator = torch.Generator().manual_seed(5)
    drawn = estimation.sample_labels(model(x), None, generator)
    generator.manual_seed(5)
    first = consolidated(model, parts, F.cross_entropy, labels="sampled", generator=generator)
    assert_close(first, oracle(adapted(), x, drawn))


def test_sampled_label_frequencies():
    """Sampled labels have the frequencies that the model predicts."""
    logits = torch.tensor([[0.0, 1.0, -1.0, -math.inf]]).expand(20000, 4)
    counts = (
        estimation.sample_labels(logits, None, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    )
    p = logits[0].softmax(-1)
    assert torch.all((counts - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt())


def test_ignored_positions():
    """Ignored positions keep their label when sampling."""
    targets = torch.tensor([[1, -100], [-100, 2]])
    drawn = estimation.sample_labels(torch.zeros(2, 2, 5), targets, None)
    assert torch.equal(drawn < 0, targets < 0)


def test_default_loss_of_tokens():
    """-log p of a sample is a sum over its positions, and the mean is one over samples."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    targets = torch.randint(0, 5, (3, 4))
    targets[0, 1:] = -100
    log_p = logits.log_softmax(-1)
    samples = [-sum(log_p[n, t, c] for t, c in enumerate(targets[n]) if c >= 0) for n in range(3)]
    for reduction, divisor in (("mean", 3), ("sum", 1)):
        loss = estimation.negative_log_likelihood(logits, targets, reduction)
        torch.testing.assert_close(loss, sum(samples) / divisor)


@pytest.mark.parametrize("labels", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(labels, reentrant):
    x, y = data(5)
    options = {"labels": labels, "generator": torch.Generator().manual_seed(2)}
    plain = consolidated(adapted(calls=2), batches(x, y, 3), **options)
    options["generator"].manual_seed(2)
    assert_close(consolidated(adapted(calls=2, reentrant=reentrant), batches(x, y, 3), **options), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand(reentrant):
    """Activation checkpointing counts once when the pass is written by hand."""
    x, y = data(5)
    model = adapted(calls=2, reentrant=reentrant)
    ewc = EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher():
        for part_x, part_y in batches(x, y, 2):
            F.cross_entropy(model(part_x), part_y).backward()
    ewc.consolidate()
    assert_close(ewc.fishers, oracle(adapted(calls=2), x, y))
    assert ewc.history[0].samples == 5


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls(reentrant, by_hand):
    """Calls of one layer that are recomputed one by one, between backward passes of the others, are still
    summed before they are squared."""
    x, y = data(5)
    model = adapted(calls=2)

    def block(x):
        q, k, v = model.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        for _ in range(model.calls):
            x = x + checkpoint(lambda x: torch.tanh(model.fc(x)), x, use_reentrant=reentrant)
        return x

    model.block = block
    ewc = EWC(model, fisher_dtype=torch.float64)
    if by_hand:
        with ewc.accumulate_fisher():
            for part_x, part_y in batches(x, y, 2):
                F.cross_entropy(model(part_x), part_y).backward()
    else:
        ewc.estimate_fisher(batches(x, y, 2), F.cross_entropy)
    ewc.consolidate()
    assert_close(ewc.fishers, oracle(adapted(calls=2), x, y))


@pytest.mark.parametrize("labels", ["empirical", "exact"])
def test_layer_called_twice(labels):
    """A layer called twice squares the sum of its gradients."""
    x, y = data(4)
    if labels == "empirical":
        expected = oracle(adapted(calls=2), x, y)
    else:
        p = adapted(calls=2)(x).softmax(-1).detach()
        pairs = [(n, c) for n in range(4) for c in range(CLASSES)]
        losses = [lambda m, n=n, c=c: -m(x[n : n + 1]).log_softmax(-1)[0, c] for n, c in pairs]
        expected = squares(adapted(calls=2), losses, [float(p[n, c]) / 4 for n, c in pairs])
    assert_close(consolidated(adapted(calls=2), batches(x, y, 3), labels=labels), expected)


def test_estimates_accumulate():
    """Several estimates before one consolidation add up."""
    x, y = data(7)
    ewc = EWC(adapted(), fisher_dtype=torch.float64)
    ewc.estimate_fisher([(x[:3], y[:3])], F.cross_entropy)
    ewc.estimate_fisher([(x[3:], y[3:])], F.cross_entropy)
    ewc.consolidate()
    assert_close(ewc.fishers, oracle(adapted(), x, y))
    assert ewc.history[0].samples == 7 and ewc.history[0].batch_size == 4


def test_manual_equals_loader():
    """A pass written by hand equals the loop over a loader."""
    x, y = data(7)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher():
        for part_x, part_y in batches(x, y, 3):
            F.cross_entropy(model(part_x), part_y).backward()
    ewc.consolidate()
    assert_close(ewc.fishers, oracle(adapted(), x, y))


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_loss_scale_divided(mode):
    """The loss scale is divided out."""
    x, y = data(6)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64, fisher_mode=mode)
    with ewc.accumulate_fisher(loss_scale=4096.0):
        (4096.0 * F.cross_entropy(model(x), y)).backward()
    ewc.consolidate()
    assert_close(ewc.fishers, consolidated(adapted(), [(x, y)], mode=mode))


def test_windowed_samples():
    """Samples folded into windows are counted as the batch size says."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):  # [N, 4 windows, 3 tokens, 4] as Swin folds them
            y = torch.tanh(self.fc(x.flatten(0, 1)))
            return self.head(y.view(*x.shape).mean((1, 2)))

    torch.manual_seed(0)
    model = Windows().double()
    inject(model, LoRAConfig(r=2, target_modules=["fc"]))
    x, y = torch.randn(5, 4, 3, 4).double(), torch.randint(0, 2, (5,))
    ewc = EWC(model, fisher_dtype=torch.float64)
    ewc.end_task([(x, y)], F.cross_entropy)
    weight = model.fc.weight.detach().clone().requires_grad_()
    total = torch.zeros_like(weight)
    for n in range(5):
        hidden = torch.tanh(F.linear(x[n], weight, model.fc.bias))
        loss = F.cross_entropy(model.head(hidden.mean((0, 1)))[None], y[n : n + 1])
        total += torch.autograd.grad(loss, weight)[0] ** 2
    assert_close(ewc.fishers, {"fc": total.detach() / 5})


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_sample_count_mismatch(mode):
    """Layers that disagree about the number of samples are refused where nothing else tells it."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.fc(x.flatten(0, 1))).view(*x.shape).mean(1))

    model = Folded()
    inject(model, LoRAConfig(r=2, target_modules=["fc", "out"]))
    ewc = EWC(model, fisher_mode=mode)
    x, y = torch.randn(5, 3, 4), torch.randint(0, 2, (5,))
    with (
        pytest.raises(FisherError, match=r"batch_size.*fc: 15|batch_size.*out: 5"),
        ewc.accumulate_fisher(check_samples=False),
    ):
        F.cross_entropy(model(x), y).backward()
    with ewc.accumulate_fisher(batch_size=5):
        F.cross_entropy(model(x), y).backward()
    ewc.consolidate()
    assert ewc.history[0].samples == 5


def dictionary(x, y):
    return {"x": x, "labels": y}


class Wrapped(nn.Module):
    """transformers style: model(**batch) -> an output with loss and logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels=None):
        logits = self.model(x)
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


def test_batch_forms():
    """Batches of every common form give the same Fisher."""
    x, y = data(5)
    parts = batches(x, y, 3)
    expected = consolidated(adapted(), parts)
    forms = {
        "list": ([list(part) for part in parts], adapted(), F.cross_entropy, {}),
        "default loss": (parts, adapted(), None, {}),
        "forward": (
            [(y, x) for x, y in parts],
            adapted(),
            F.cross_entropy,
            {"forward": lambda m, b: (m(b[1]), b[0])},
        ),
    }
    for form, (loader, model, loss_fn, options) in forms.items():
        actual = consolidated(model, loader, loss_fn, **options)
        for key in KEYS:
            assert torch.equal(actual[key], expected[key]), form
    ewc = EWC(Wrapped(adapted()), fisher_dtype=torch.float64)
    ewc.end_task([dictionary(*part) for part in parts])
    assert all(torch.equal(ewc.fishers[f"model.{key}"], expected[key]) for key in KEYS)


def test_modes_restored():
    """Modes and gradients are as before, even after an error."""
    x, y = data(6)
    model = adapted()
    model.train()
    model.head.eval()
    F.cross_entropy(model(x), y).backward()
    held = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    ewc = EWC(model)

    def failing(output, target):
        assert not model.training and model.head.weight.grad is None
        raise RuntimeError("from the loss")

    with pytest.raises(RuntimeError, match="from the loss"):
        ewc.estimate_fisher(batches(x, y, 2), failing)
    ewc.estimate_fisher(batches(x, y, 2), F.cross_entropy)
    assert model.training and model.fc.training and not model.head.training
    for name, parameter in model.named_parameters():
        grad, value = held[name]
        assert parameter.grad is grad and (grad is None or torch.equal(grad, value)), name
    assert all(layer.fisher_capture is None for layer in layers(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_discards_pass(bad):
    """Non-finite data raise an error and discard only what that pass gathered."""
    x, y = data(6)
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64)
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    before = snapshot(model)
    broken = x.clone()
    broken[4, 1, 2] = bad
    with pytest.raises(FisherError, match=r"finite.*discarded"):
        ewc.estimate_fisher(batches(broken, y, 2), F.cross_entropy)
    assert_same(before, snapshot(model))
    ewc.consolidate()
    assert_close(ewc.fishers, oracle(adapted(), x, y))
    assert ewc.history[0].samples == 6


def test_check_finite_off():
    """`check_finite` can be turned off."""
    x, y = data(2)
    ewc = EWC(adapted(), check_finite=False)
    ewc.end_task([(x * math.nan, y)], F.cross_entropy)
    assert all(bool(fisher.isnan().all()) for fisher in ewc.fishers.values())


def test_max_batches_limit():
    """With `max_batches`, the loader is read no further."""
    x, y = data(6)

    def endless():
        while True:
            yield x, y

    ewc = EWC(adapted())
    ewc.end_task(endless(), F.cross_entropy, max_batches=2)
    assert ewc.history[0].samples == 12


def test_progress_bar_optional(capfd):
    """The progress bar shows only when asked for."""
    x, y = data(2)
    ewc = EWC(adapted())
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    assert "Fisher" not in capfd.readouterr().err
    ewc.estimate_fisher([(x, y)], F.cross_entropy, progress=True)
    assert "Fisher" in capfd.readouterr().err


def test_empty_batch():
    """An empty batch adds nothing."""
    model, (x, y) = adapted(), data(4)
    ewc = EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher():
        F.cross_entropy(model(x), y).backward()
        (model(x[:0]).sum() * 0.0).backward()
    ewc.consolidate()
    assert ewc.history[0].samples == 4
    assert_close(ewc.fishers, oracle(adapted(), x, y))


def test_empty_batch_in_a_loader():
    """The batches after an empty one count."""
    x, y = data(4)
    loader = [(x[:1], y[:1]), (x[:0], y[:0]), (x[1:], y[1:])]
    assert_close(consolidated(adapted(), loader), oracle(adapted(), x, y))
