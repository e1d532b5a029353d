# SPDX-License-Identifier: Apache-2.0
"""Which loss a Fisher pass takes, against gradients of one sample at a time in fp64."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CLASSES, KEYS, WIDTH, adapted, batches, data, squares
from torch import nn

from fused_ewclora.errors import ArgumentError, FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.losses import default_loss, exact_terms, negative_log_likelihood

EPS = torch.finfo(torch.float64).eps
IGNORED = -100
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def fisher(model, loader, loss_fn=None, mode="sample", **options):
    ewc = EWC(model, fisher_mode=mode, fisher_dtype=torch.float64)
    ewc.end_task(loader, loss_fn, **options)
    return ewc


def assert_close(ewc, expected, message=""):
    """1e3 roundings of the largest entry, as in test_estimation."""
    for key, value in expected.items():
        error = float((ewc.fishers[key] - value).abs().max())
        assert error <= 1e3 * EPS * float(value.abs().max()), (message, key, error)


def oracle(x, losses_of, **options):
    """(1/N) sum_n (d loss_n)^2, loss_n = losses_of(logits of sample n alone, n)."""
    losses = [lambda m, n=n: losses_of(m(x[n : n + 1]), n) for n in range(len(x))]
    return squares(adapted(**options), losses, [1 / len(x)] * len(x))


def some_ignored(samples, seed=1, at=(0, 3)):
    x, y = data(samples, seed)
    y[list(at)] = IGNORED
    return x, y


CROSS_ENTROPIES = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "partial": functools.partial(F.cross_entropy),
    "default": None,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "partial sum": functools.partial(F.cross_entropy, reduction="sum"),
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_ignored_targets(name, size):
    """Ignored targets have no gradient and count as samples, whatever the batches."""
    x, y = some_ignored(7)
    ewc = fisher(adapted(), batches(x, y, size), CROSS_ENTROPIES[name])
    assert_close(ewc, oracle(x, lambda out, n: F.cross_entropy(out, y[n : n + 1], reduction="sum")))
    assert ewc.history[0].samples == 7


@given(ignored=st.sets(st.integers(0, 5), max_size=5), size=st.integers(1, 6))
def test_any_ignored(ignored, size):
    """Any set of ignored targets leaves the Fisher of the others, over all samples."""
    x, y = some_ignored(6, at=ignored)
    ewc = fisher(adapted(), batches(x, y, size), F.cross_entropy)
    assert_close(ewc, oracle(x, lambda out, n: F.cross_entropy(out, y[n : n + 1], reduction="sum")))


@pytest.mark.parametrize("loss_fn", [nn.NLLLoss(), F.nll_loss, nn.NLLLoss(reduction="sum"), F.cross_entropy])
def test_log_probabilities(loss_fn):
    """The negative log-likelihood loss is known as cross entropy is."""
    x, y = some_ignored(5)
    forward = lambda m, b: (m(b[0]).log_softmax(-1), b[1])  # noqa: E731
    ewc = fisher(adapted(), batches(x, y, 3), loss_fn, forward=forward)
    assert_close(ewc, oracle(x, lambda out, n: F.cross_entropy(out, y[n : n + 1], reduction="sum")))


def test_other_ignore_index():
    """The index that a loss ignores is read from it."""
    x, y = some_ignored(5)
    y = torch.where(y == IGNORED, 255, y)
    ewc = fisher(adapted(), batches(x, y, 5), nn.CrossEntropyLoss(ignore_index=255))
    expected = lambda out, n: F.cross_entropy(out, y[n : n + 1], ignore_index=255, reduction="sum")  # noqa: E731
    assert_close(ewc, oracle(x, expected))


def test_label_smoothing():
    """Smoothed labels are a mean over samples."""
    x, y = some_ignored(5)
    ewc = fisher(adapted(), batches(x, y, 3), nn.CrossEntropyLoss(label_smoothing=0.2))
    expected = lambda out, n: F.cross_entropy(out, y[n : n + 1], label_smoothing=0.2, reduction="sum")  # noqa: E731
    assert_close(ewc, oracle(x, expected))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(reduction="sum"), None])
@pytest.mark.parametrize("labels", ["empirical", "sampled", "exact"])
def test_all_ignored(loss_fn, labels):
    """A pass in which no target counts is an error."""
    x, y = some_ignored(4, at=range(4))
    with pytest.raises(FisherError, match="every target of the pass is ignored"):
        fisher(adapted(), batches(x, y, 2), loss_fn, labels=labels)


def test_class_weights_refused():
    """A mean with class weights is refused; the sum has the loss w_y l_n."""
    x, y = data(6)
    for loss_fn in (nn.CrossEntropyLoss(WEIGHT), functools.partial(F.cross_entropy, weight=WEIGHT)):
        with pytest.raises(ArgumentError, match=r"class weights.*reduction='sum'"):
            fisher(adapted(), batches(x, y, 3), loss_fn)
    ewc = fisher(adapted(), batches(x, y, 3), nn.CrossEntropyLoss(WEIGHT, reduction="sum"))
    assert_close(ewc, oracle(x, lambda out, n: WEIGHT[y[n]] * F.cross_entropy(out, y[n : n + 1])))


REDUCTIONS = [
    (nn.CrossEntropyLoss(reduction="sum"), "mean", "expected 'sum', the reduction of loss_fn, got 'mean'"),
    (F.cross_entropy, "sum", "expected 'mean'.*got 'sum'"),
    (functools.partial(F.mse_loss, reduction="sum"), "mean", "expected 'sum'"),
    (nn.KLDivLoss(reduction="batchmean"), "sum", "expected 'mean'"),
    (nn.CrossEntropyLoss(reduction="none"), None, "'none'"),
    (functools.partial(F.cross_entropy, reduction="none"), "mean", "'none'"),
    (F.cross_entropy, "none", "reduction: expected one of"),
]


@pytest.mark.parametrize(("loss_fn", "reduction", "message"), REDUCTIONS)
def test_contradicting_reduction(loss_fn, reduction, message):
    """A reduction that contradicts the loss is refused."""
    with pytest.raises(ArgumentError, match=message):
        fisher(adapted(), [data(4)], loss_fn, reduction=reduction)


def with_default(output, target, reduction="sum"):
    return F.mse_loss(output, F.one_hot(target, CLASSES).double(), reduction=reduction)


class Squares(nn.Module):
    """A loss of another library, which says how it reduces."""

    reduction = "sum"

    def forward(self, output, target):
        return with_default(output, target)


@pytest.mark.parametrize("loss_fn", [with_default, Squares()])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_reduction_is_read(loss_fn, mode):
    """The reduction is read from the attribute or the argument of any loss."""
    x, y = data(6)
    given = lambda output, target: with_default(output, target)  # noqa: E731
    expected = fisher(adapted(), batches(x, y, 4), given, reduction="sum", mode=mode).fishers
    assert_close(fisher(adapted(), batches(x, y, 4), loss_fn, mode=mode), expected)


class Tokens(nn.Module):
    """Logits of every position, the classes last or, for cross_entropy, second."""

    def __init__(self, model, second=False):
        super().__init__()
        self.model, self.second = model, second

    def forward(self, x):
        logits = self.model.head(self.model.block(x))
        return logits.movedim(-1, 1) if self.second else logits


def token_data(counts, seed=1):
    """x, and targets of which as many count as `counts` says."""
    x, _ = data(len(counts), seed)
    y = torch.randint(0, CLASSES, x.shape[:2])
    for n, count in enumerate(counts):
        y[n, count:] = IGNORED
    return x, y


def token_oracle(x, y, mean=False):
    def loss(m, n):
        logits = m.head(m.block(x[n : n + 1])).flatten(0, 1)
        total = F.cross_entropy(logits, y[n], reduction="sum")
        return total / max(1, int((y[n] >= 0).sum())) if mean else total

    losses = [lambda m, n=n: loss(m, n) for n in range(len(x))]
    return {f"model.{key}": value for key, value in squares(adapted(), losses, [1 / len(x)] * len(x)).items()}


def test_token_sums():
    """Without a loss function the loss of a sample is the sum over its tokens; so is a sum."""
    x, y = token_data([3, 1, 2, 0, 3])
    assert_close(fisher(Tokens(adapted()), batches(x, y, 2)), token_oracle(x, y))
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert_close(fisher(Tokens(adapted(), second=True), batches(x, y, 3), summed), token_oracle(x, y))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [2, 2, 0, 2]])
def test_token_means(counts, flat):
    """A mean over tokens is one over samples when all that count have equally many tokens."""
    x, y = token_data(counts)
    forward = lambda m, b: (m(b[0]), b[1])  # noqa: E731
    if flat:
        forward = lambda m, b: (m(b[0]).movedim(1, -1).flatten(0, 1), b[1].flatten())  # noqa: E731
    ewc = fisher(Tokens(adapted(), second=True), batches(x, y, 2), F.cross_entropy, forward=forward)
    assert_close(ewc, token_oracle(x, y, mean=True))


@pytest.mark.parametrize("at", [0, 4])
def test_ragged_token_means(at):
    """A mean over tokens is refused where samples have different numbers, in the first batch or later."""
    counts = [3] * 8
    counts[at] = 1
    x, y = token_data(counts)
    with pytest.raises(FisherError, match=rf"different numbers of targets.*'sum'.*batch {at // 2 + 1}"):
        fisher(Tokens(adapted(), second=True), batches(x, y, 2), F.cross_entropy)


UNCOMMON = {
    "ignored": lambda o, y: F.cross_entropy(o, y),
    "weighted": lambda o, y: F.cross_entropy(o, y.clamp(min=0), WEIGHT.to(o)),
    "over the batch": lambda o, y: F.cross_entropy((o - o.mean(0)) / o.std(0), y.clamp(min=0)),
    "pairs": lambda o, y: (o @ o.T).logsumexp(1).mean(),
}


@pytest.mark.parametrize("name", UNCOMMON)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_mean_over_samples(name, dtype):
    """A loss that is no mean over samples is refused in words, and on request taken as it is."""
    x, y = some_ignored(6, at=(1, 2))
    ewc = EWC(adapted(dtype=dtype), fisher_dtype=dtype)
    with pytest.raises(FisherError, match=r"mean of the losses of the samples.*check_samples=False"):
        ewc.estimate_fisher([(x.to(dtype), y)], UNCOMMON[name])
    ewc.estimate_fisher([(x.to(dtype), y)], UNCOMMON[name], check_samples=False)


def test_loss_of_one_sample():
    """The loss of the worst sample is no sum, although its gradient at that sample is that of one."""
    x, y = data(6)
    largest = lambda o, target: F.cross_entropy(o, target, reduction="none").max()  # noqa: E731
    for reduction in ("mean", "sum"):
        with pytest.raises(FisherError, match=f"expected a {reduction} of the losses"):
            fisher(adapted(), batches(x, y, 3), largest, reduction=reduction)


def test_fault_in_later_batch():
    """The loss of every batch is checked."""
    x, y = some_ignored(9, at=(7,))
    with pytest.raises(FisherError, match=r"is 1.5 times that of its own loss.*ignored targets"):
        fisher(adapted(), batches(x, y, 3), lambda output, target: F.cross_entropy(output, target))


def focal(log_p):
    return ((1 - log_p.exp()) ** 2 * -log_p).mean()


COMMON = {
    "cross entropy": lambda o, y: F.cross_entropy(o, y),
    "squares": lambda o, y: F.mse_loss(o, F.one_hot(y, CLASSES).to(o)),
    "binary": lambda o, y: F.binary_cross_entropy_with_logits(o, F.one_hot(y, CLASSES).to(o)),
    "focal": lambda o, y: focal(o.log_softmax(-1)[range(len(y)), y]),
    "margin": lambda o, y: F.multi_margin_loss(o.float(), y),
    "constant": lambda o, y: F.cross_entropy(o, y) + 1e6,
}  # fmt: skip


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_over_samples(name, dtype):
    """Losses that are means over samples pass, in every precision; as sums they are recognised."""
    x, y = data(6, dtype=dtype)
    model = adapted(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ewc = EWC(model, fisher_dtype=wide)
    ewc.estimate_fisher(batches(x, y, 3), COMMON[name])
    with pytest.raises(
        FisherError, match="looks like a mean over samples, expected a sum; give reduction='mean'"
    ):
        ewc.estimate_fisher(batches(x, y, 3), COMMON[name], reduction="sum")
    with pytest.raises(FisherError, match="looks like a sum over samples"):
        ewc.estimate_fisher(
            batches(x, y, 3), lambda output, target: len(target) * COMMON[name](output, target)
        )


class Record(dict):
    """An output with attributes, which a copy of its entries lacks."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("kind", [dict, Record])
def test_upstream_outputs(kind):
    """Hidden states in the output, from which the logits are computed, do not confuse the check."""
    x, y = data(6)
    loss = lambda o, t: F.cross_entropy(o["logits"], t) + getattr(o, "hidden", o["hidden"]).square().mean()  # noqa: E731

    def forward(model, batch):
        hidden = model.block(batch[0])
        return kind(logits=model.head(hidden.mean(1)), hidden=hidden), batch[1]

    losses = [
        lambda m, n=n: loss(dict(forward(m, (x[n : n + 1], y))[0]), y[n : n + 1]) for n in range(len(x))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc = fisher(adapted(), batches(x, y, 3), loss, forward=forward)
    assert_close(ewc, squares(adapted(), losses, [1 / 6] * 6))


def test_loss_with_state():
    """A loss is called once with each batch and then with two samples; its running statistics are of
    batches."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = []

        def forward(self, output, target):
            self.calls.append(len(target))
            self.seen += len(target)
            return F.cross_entropy(output, target)

    loss_fn = Running()
    x, y = data(7)
    assert_close(
        fisher(adapted(), batches(x, y, 3), loss_fn),
        oracle(x, lambda out, n: F.cross_entropy(out, y[n : n + 1])),
    )
    assert loss_fn.calls == [3, 1, 1, 3, 1, 1, 1] and int(loss_fn.seen) == 7


@pytest.mark.parametrize("by_hand", [False, True])
def test_penalty_in_loss(by_hand):
    """The penalty has no gradient at the inputs of adapters' layers, so it does not enter."""
    x, y = data(6)
    model = adapted()
    ewc = EWC(model, ewc_lambda=1e3, fisher_dtype=torch.float64)
    ewc.end_task([(x, y)], F.cross_entropy, gamma=0.0)
    with torch.no_grad():
        model.fc.lora_B.normal_(0, 0.3)
    expected = oracle_of(model, x, y)
    assert ewc.penalty() > 0
    if by_hand:
        with ewc.accumulate_fisher():
            for part_x, part_y in batches(x, y, 3):
                (F.cross_entropy(model(part_x), part_y) + ewc.penalty()).backward()
    else:
        ewc.estimate_fisher(batches(x, y, 3), lambda o, target: F.cross_entropy(o, target) + ewc.penalty())
    ewc.consolidate(gamma=0.0)
    assert_close(ewc, expected)


def oracle_of(model, x, y):
    losses = [lambda m, n=n: F.cross_entropy(m(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
    return squares(model, losses, [1 / len(x)] * len(x))


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, nn.CrossEntropyLoss(WEIGHT, reduction="sum")])
def test_soft_targets(loss_fn):
    """Class probabilities are targets: -sum_c y_c log p_c."""
    x, _ = data(6)
    y = torch.rand(6, CLASSES, dtype=torch.float64).softmax(-1)
    weight = WEIGHT if isinstance(loss_fn, nn.Module) else torch.ones_like(WEIGHT)
    ewc = fisher(adapted(), batches(x, y, 4), loss_fn)
    assert_close(ewc, oracle(x, lambda out, n: -(weight * y[n] * out.log_softmax(-1)).sum()))


def test_soft_masked_class():
    """A masked class of probability 0 has no loss."""
    x, _ = data(4)
    mask = torch.tensor([0.0, -math.inf, 0.0, 0.0], dtype=torch.float64)
    y = (torch.randn(4, CLASSES, dtype=torch.float64) + mask).softmax(-1)
    ewc = fisher(adapted(), batches(x, y, 2), logits_fn=lambda logits: logits + mask)
    kept = [0, 2, 3]
    assert_close(ewc, oracle(x, lambda out, n: -(y[n, kept] * out[:, kept].log_softmax(-1)).sum()))


WRONG_TARGETS = {
    "no probabilities": (torch.full((4, CLASSES), 0.5), "class probabilities, rows >= 0 that sum to 1"),
    "negative": (torch.tensor([[1.5, -0.5, 0.0, 0.0]] * 4), "class probabilities"),
    "numbers": (torch.rand(4), r"class indices \[4\] or class probabilities \[4, 4\].*\[4\] torch.float32"),
    "one-hot integers": (torch.eye(4).long(), r"class indices \[4\].*got \[4, 4\] torch.int64.*loss_fn"),
    "several labels": (torch.eye(4).bool(), r"class indices.*torch.bool"),
    "tokens": (torch.zeros(4, 7).long(), r"class indices \[4\].*got \[4, 7\]"),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_wrong_targets(name):
    """Targets that do not fit the logits are refused in words."""
    targets, message = WRONG_TARGETS[name]
    with pytest.raises(FisherError, match=message):
        fisher(adapted(), [(data(4)[0], targets)])
    if not targets.is_floating_point() or targets.dim() == 1:
        with pytest.raises(FisherError, match=r"class indices"):
            fisher(adapted(), [(data(4)[0], targets)], F.cross_entropy)


def test_cross_entropy_of_objects():
    """Cross entropy of an output that is no tensor says what to give."""
    x, y = data(4)
    for forward in (lambda m, b: ({"logits": m(b[0])}, b[1]), lambda m, b: (m(b[0]), None)):
        with pytest.raises(FisherError, match="to be a tensor for cross_entropy"):
            fisher(adapted(), [(x, y)], F.cross_entropy, forward=forward)


def test_samples_of_logits():
    """Logits and targets of another number of samples than the batch are refused."""
    x, y = data(4)
    forward = lambda m, b: (m(b[0])[:3], b[1][:3])  # noqa: E731
    for loss_fn in (None, F.cross_entropy):
        with pytest.raises(FisherError, match=r"expected .* of 4 samples"):
            fisher(adapted(), [(x, y)], loss_fn, forward=forward)


def test_column_of_labels():
    """Labels may have a last dimension of 1."""
    x, y = some_ignored(6)
    expected = oracle(x, lambda out, n: F.cross_entropy(out, y[n : n + 1], reduction="sum"))
    assert_close(fisher(adapted(), batches(x, y[:, None], 4)), expected)


def test_classes_of_logits_fn():
    """Without a loss function the targets are classes of logits_fn(output)."""
    x, y = data(6)
    y = y % 2
    ewc = fisher(adapted(), batches(x, y, 4), logits_fn=lambda logits: logits[:, 2:])
    assert_close(ewc, oracle(x, lambda out, n: F.cross_entropy(out[:, 2:], y[n : n + 1])))


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy, lambda o, y: F.cross_entropy(o, y)])
def test_sampled_ignored(loss_fn):
    """Sampled labels keep what is ignored, whose samples count with zero gradient."""
    x, y = some_ignored(6, at=(0, 3) if loss_fn in (None, F.cross_entropy) else ())
    options = {"labels": "sampled", "generator": torch.Generator().manual_seed(1)}
    ewc = fisher(adapted(), [(x, y)], loss_fn, **options)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(adapted()(x).detach().float().softmax(-1).double(), 1, generator=generator)[
        :, 0
    ]
    drawn = torch.where(y == IGNORED, y, drawn)
    assert ewc.history[0].samples == 6 and set(ewc.fishers) == set(KEYS)
    losses = oracle(x, lambda out, n: F.cross_entropy(out, drawn[n : n + 1], reduction="sum"))
    for key, value in losses.items():
        torch.testing.assert_close(ewc.fishers[key], value, rtol=1e-9, atol=0.0)


def test_sampled_tokens_of_cross_entropy():
    """Cross entropy takes the classes from dimension 1, and labels are drawn from there."""
    x, y = token_data([3, 3, 3, 3])
    options = {"labels": "sampled"}
    fishers = []
    for second, loss_fn in ((True, nn.CrossEntropyLoss(reduction="sum")), (False, None)):
        generator = torch.Generator().manual_seed(1)
        model = Tokens(adapted(), second)
        fishers.append(fisher(model, batches(x, y, 2), loss_fn, generator=generator, **options).fishers)
    for key, value in fishers[1].items():
        torch.testing.assert_close(fishers[0][key], value, rtol=1e-12, atol=0.0)


def test_sampled_unplaced():
    """Ignored targets of another shape than the sampled labels are refused."""
    x, y = some_ignored(4)
    with pytest.raises(FisherError, match=r"ignored targets .* another shape"):
        fisher(Tokens(adapted()), [(x, y)], labels="sampled")
    fisher(Tokens(adapted()), [data(4)], labels="sampled")


def test_exact_ignored():
    """Exact labels leave ignored samples out and count them."""
    x, y = some_ignored(5)
    kept = [n for n in range(5) if y[n] != IGNORED]
    expected = fisher(adapted(), [(x[kept], None)], labels="exact").fishers
    ewc = fisher(adapted(), batches(x, y, 2), F.cross_entropy, labels="exact")
    assert_close(ewc, {key: value * len(kept) / 5 for key, value in expected.items()})
    assert sum(float(term) for term in exact_terms(torch.zeros(2, 3), torch.zeros(2))) == 0


def test_default_loss_function():
    """The functions of earlier versions give the losses of a batch."""
    logits, y = torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (5,))
    expected = F.cross_entropy(logits, y)
    torch.testing.assert_close(default_loss(logits, y, "mean"), expected)
    torch.testing.assert_close(default_loss({"logits": logits, "loss": expected}, y, "sum"), 5 * expected)
    torch.testing.assert_close(negative_log_likelihood(logits, y, "mean"), expected)
    own = torch.ones((), requires_grad=True)
    assert default_loss({"loss": own}, y, "mean") is own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sums(dtype):
    """The sum over many targets does not overflow."""
    logits = torch.zeros(4, 20000, 3, dtype=dtype)
    logits[..., 0] = 8.0
    targets = torch.ones(4, 20000).long()
    assert abs(float(negative_log_likelihood(logits, targets, "sum")) / 8.0007 / 80000 - 1) < 1e-2
