# SPDX-License-Identifier: Apache-2.0
"""Which rows of a layer's input belong to which sample: found and right, or refused."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import ArgumentError, FisherError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.inject import inject

WIDTH, CLASSES = 6, 3


class Net(nn.Module):
    """x `[N, T, 6]` -> logits `[N, 3]`: `arrange` brings the tokens into another order, in which `fc` sees
    them, and `restore` brings them back."""

    def __init__(self, arrange=lambda x: x, restore=lambda x, samples: x) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.arrange, self.restore = arrange, restore
        self.calls: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.calls[len(x)] += 1
        y = self.restore(torch.tanh(self.fc(self.arrange(x))), len(x))
        return self.head((x * y).sum(1))


def windows(x: Tensor, size: int = 2) -> Tensor:
    return x.unflatten(1, (-1, size))


ORDERS = {
    "samples first": (lambda x: x, lambda y, n: y),
    "sequence first": (lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1)),
    "sequence last": (lambda x: x[:, None].transpose(0, 2), lambda y, n: y.transpose(0, 2)[:, 0]),
    "rows": (lambda x: x.flatten(0, 1), lambda y, n: y.unflatten(0, (n, -1))),
    "time rows": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, n: y.unflatten(0, (-1, n)).transpose(0, 1),
    ),
    "windows": (lambda x: windows(x).flatten(0, 1), lambda y, n: y.unflatten(0, (n, -1)).flatten(1, 2)),
    "windows first": (
        lambda x: windows(x).transpose(0, 1).flatten(0, 1),
        lambda y, n: y.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, 2),
    ),
}


def adapted(plain: nn.Module, targets=("fc",), **options) -> tuple[nn.Module, EWC]:
    torch.manual_seed(1)
    model = copy.deepcopy(plain).double()
    inject(model, LoRAConfig(r=2, target_modules=list(targets)))
    return model, EWC(model, **options)


def data(samples: int, tokens: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def oracle(plain: nn.Module, batches, name: str = "fc", mode: str = "sample") -> Tensor:
    """The Fisher of a weight of the plain model, one sample at a time."""
    plain = copy.deepcopy(plain).double().eval()
    weight = plain.get_submodule(name).weight
    total, count = torch.zeros_like(weight), 0
    for x, y in batches:
        losses = [F.cross_entropy(plain(x[n : n + 1]), y[n : n + 1]) for n in range(len(x))]
        grads = torch.stack([torch.autograd.grad(loss, weight, materialize_grads=True)[0] for loss in losses])
        total += grads.square().sum(0) if mode == "sample" else len(x) * grads.mean(0).square()
        count += len(x)
    return (total / count).detach()


def assert_right(ewc: EWC, plain: nn.Module, batches, names=("fc",), mode: str = "sample") -> None:
    """The Fisher was summed in fp64 and rounded once, to fp32."""
    ewc.consolidate()
    for name in names:
        want = oracle(plain, batches, name, mode).float()
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(ewc.fishers[name], want, rtol=2 * eps, atol=eps * float(want.max()))


@pytest.mark.parametrize(("by_hand", "mode", "tokens"), [(0, "sample", 4), (1, "sample", 6), (1, "batch", 6)])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(order, by_hand, mode, tokens):
    """Every known order gives the Fisher of single samples, also in a last batch of one or two; mode "batch"
    needs none."""
    plain = Net(*ORDERS[order])
    model, ewc = adapted(plain, fisher_mode=mode)
    batches = [data(n, tokens, seed=n) for n in (4, 4, 2, 1)]
    if by_hand:
        with ewc.accumulate_fisher() as running:
            for x, y in batches:
                running.batch_size = len(y) if mode == "batch" else None
                F.cross_entropy(model(x), y).backward()
    else:
        ewc.estimate_fisher(batches, F.cross_entropy)
    assert_right(ewc, plain, batches, mode=mode)


@pytest.mark.parametrize(("samples", "tokens"), [(4, 8), (4, 6), (3, 3), (2, 5), (5, 1)])
def test_torch_encoder(samples, tokens):
    """PyTorch's encoder layer, sequence first by default, with numbers of tokens that are multiples of the
    number of samples and others."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.transpose(0, 1)).mean(0))

    torch.manual_seed(0)
    plain = Encoder()
    _, ewc = adapted(plain, ["linear1", "linear2"])
    batches = [data(samples, tokens)]
    ewc.estimate_fisher(batches, F.cross_entropy)
    assert_right(ewc, plain, batches, ["layer.linear1", "layer.linear2"])


def test_two_orders():
    """A layer may be called in two orders in one forward pass."""

    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.fc(x)) + torch.tanh(self.fc(x.sin().transpose(0, 1))).transpose(0, 1)
            return self.head((x * y).sum(1))

    plain = Both()
    batches = [data(3, 5), data(2, 5, seed=1)]
    _, ewc = adapted(plain)
    ewc.estimate_fisher(batches, F.cross_entropy)
    assert_right(ewc, plain, batches)
    _, ewc = adapted(plain)
    with pytest.raises(FisherError, match="fc: 3 samples have no single order"):
        ewc.estimate_fisher([data(3, 3)], F.cross_entropy)


@pytest.mark.parametrize("by_hand", [False, True])
def test_rows_and_pooled(by_hand):
    """A layer may be called on flattened tokens, on their mean and in other dimensions."""

    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            rows, pooled = self.fc(x.flatten(0, 1)).view_as(x), self.fc(x.mean(1))
            turned = self.fc(x.cos().transpose(0, 1)).transpose(0, 1)
            return self.head((x * torch.tanh(rows + turned)).sum(1) * torch.tanh(pooled))

    plain, (x, y) = Pooled(), data(5, 3)
    model, ewc = adapted(plain)
    if by_hand:
        with ewc.accumulate_fisher():
            F.cross_entropy(model(x), y).backward()
    else:
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
    assert_right(ewc, plain, [(x, y)])


def test_later_layers():
    """Layers that run first in a later batch, and rows per sample that change, are found then."""

    class Later(Net):
        def __init__(self) -> None:
            super().__init__(*ORDERS["time rows"])
            self.late = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.late(x.transpose(0, 1)).transpose(0, 1) if x.shape[1] > 2 else x)

    plain = Later()
    _, ewc = adapted(plain, ["fc", "late"])
    batches = [data(4, 2), data(4, 4), data(3, 6), data(3, 4)]
    ewc.estimate_fisher(batches, F.cross_entropy)
    assert_right(ewc, plain, batches, ["fc", "late"])


class Routed(Net):
    """Each token goes to one of two experts, by the sign of its first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.where: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x, y = torch.tanh(self.fc(x)), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (x[..., 0] > 0) == bool(i)
            self.where[f"experts.{i}"] = mask.nonzero()[:, 0]
            y[mask] = torch.tanh(expert(x[mask]))
        return self.head((x * y).sum(1))


def sample_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    return model.where[name]


@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_routed_experts(samples):
    """Routed rows are refused by name, and right with `rows_to_samples`, also of samples without rows."""
    torch.manual_seed(0)
    plain, batches = Routed(), [data(samples, 3, seed=1), data(samples, 3, seed=2), data(1, 3)]
    names = ["experts.0", "experts.1"]
    model, ewc = adapted(plain, ["fc", *names])
    with pytest.raises(FisherError, match=r"experts\..*rows_to_samples"):
        ewc.estimate_fisher(batches, F.cross_entropy)
    functions = {name: partial(sample_of, model, name) for name in names}
    ewc.estimate_fisher(batches, F.cross_entropy, rows_to_samples=functions)
    assert_right(ewc, plain, batches, ["fc", *names])


@pytest.mark.parametrize("counts", [(2, 1, 3, 2), (2, 1, 4, 1, 2), (2, 2, 2, 2)])
@pytest.mark.parametrize("train", [False, True])
def test_middle_samples(counts, train):
    """Samples between the first and the last may have other numbers of rows, which are refused too."""

    class Chosen(Net):
        def forward(self, x: Tensor) -> Tensor:
            mask, y = x[..., 0] > 0, torch.zeros_like(x)
            y[mask] = torch.tanh(self.fc(x[mask]))
            return self.head((x * y).sum(1))

    x, y = data(len(counts), 4)
    x[..., 0] = torch.where(torch.arange(4) < torch.tensor(counts)[:, None], 1.0, -1.0)
    plain = Chosen()
    model, ewc = adapted(plain)
    model.train(train)
    if len(set(counts)) == 1:
        with ewc.accumulate_fisher():
            F.cross_entropy(model(x), y).backward()
        assert_right(ewc, plain, [(x, y)])
    else:
        with pytest.raises(FisherError, match=r"fc: .* in reverse"), ewc.accumulate_fisher():
            model(x)
    assert model.fc.forward_calls == 1


def test_calls_with_indices():
    """Rows of several calls are joined before they are squared."""

    class Shuffled(Net):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            y = torch.zeros_like(rows)
            for seed in (3, 4):
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
                self.index = order // x.shape[1]
                y[order] += torch.tanh(self.fc(rows[order] * seed))
            return self.head((x * y.view_as(x)).sum(1))

    plain, batches = Shuffled(), [data(3, 4)]
    model, ewc = adapted(plain)
    with ewc.accumulate_fisher(rows_to_samples={"fc": lambda x: model.index}):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
    # Alone a sample is permuted otherwise, so that the order of samples in the sum is another.
    assert_right(ewc, plain, batches)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: None, "expected an int64 tensor, got NoneType"),
        (lambda x: torch.zeros(len(x)), "expected an int64 tensor, got torch.float32"),
        (
            lambda x: torch.zeros(3, dtype=torch.int64),
            r"expected the sample of each of the 12 rows of x, got shape \[3\]",
        ),
        (lambda x: torch.arange(len(x)), "expected samples from 0 to 2, got 0 to 11"),
        (lambda x: torch.arange(len(x)) - 1, "expected samples from 0 to 2, got -1 to 10"),
    ],
)
def test_bad_index(function, words):
    """What `rows_to_samples` returns is checked."""
    _, ewc = adapted(Net())
    with pytest.raises(FisherError, match=r"rows_to_samples\['fc'\]: " + words):
        ewc.estimate_fisher([data(3)], F.cross_entropy, rows_to_samples={"fc": function})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows_to_samples": len}, "rows_to_samples: expected a mapping"),
        ({"rows_to_samples": {"other": len}}, "no adapted layer is called 'other'; there are fc"),
        ({"rows_to_samples": {"fc": 3}}, r"rows_to_samples\['fc'\]: expected a function, got int"),
        ({"check_samples": 1}, "check_samples: expected True or False, got 1"),
    ],
)
def test_bad_options(options, words):
    """Arguments are checked before anything runs."""
    model, ewc = adapted(Net())
    with pytest.raises(ArgumentError, match=words):
        ewc.end_task([data(3)], F.cross_entropy, **options)
    assert not model.calls


def refused(model: nn.Module, ewc: EWC, words: str, samples: int = 4, tokens: int = 4, **options) -> None:
    with pytest.raises(FisherError, match=words):
        ewc.estimate_fisher([data(samples, tokens)], F.cross_entropy, **options)
    with pytest.raises(FisherError, match="no Fisher yet"):
        ewc.consolidate()


@pytest.mark.parametrize("classes", [8, 4, 5])
@pytest.mark.parametrize("samples", [4, 2])
def test_prompts(classes, samples):
    """A layer that sees class prompts has no rows of a sample; mode "batch" takes it."""

    class Prompted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("prompts", torch.randn(classes, 5, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x)).sum(1) @ self.text(self.prompts).mean(1).T

    torch.manual_seed(0)
    plain = Prompted()
    refused(*adapted(plain, ["fc", "text"]), rf"text: .*\[{classes}, 5, 6\]", samples)
    _, ewc = adapted(plain, ["fc", "text"], fisher_mode="batch")
    batches = [data(samples), data(samples, seed=1)]
    ewc.estimate_fisher(batches, F.cross_entropy)
    assert_right(ewc, plain, batches, ["fc", "text"], mode="batch")


class Contrastive(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).mean(1)
        return y @ x.mean(1).T


class Normalised(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).mean(1)
        return self.head(y - y.mean(0) * 0.5)


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.fc(sample).mean(0) for sample in x]))


class Shuffle(Net):
    """Rows in an order that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        order = rows[:, 0].argsort()
        return self.head(self.fc(rows[order])[order.argsort()].view_as(x).mean(1))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Contrastive, "output: differs .* samples act on each other"),
        (Normalised, "output: differs"),
        (Loop, "fc: .* called 4 times for 4 samples, and 1 and 1 times"),
        (Shuffle, r"fc: .*\[16, 6\] for 4 samples .* in no known order"),
    ],
)
def test_refused(kind, words):
    """Samples that act on each other, and rows in other orders, are refused in mode "sample" alone."""
    torch.manual_seed(0)
    refused(*adapted(kind()), words)
    _, ewc = adapted(kind(), fisher_mode="batch")
    ewc.end_task([data(4)], F.cross_entropy)


def test_alike_rows():
    """Rows that are all alike fit two orders; one order that the shape decides needs no contents."""
    zeros = [(torch.zeros(4, 4, WIDTH, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))]
    _, ewc = adapted(Net(*ORDERS["rows"]))
    with pytest.raises(FisherError, match=r"fc: .* alike"):
        ewc.estimate_fisher(zeros, F.cross_entropy)
    _, ewc = adapted(Net(*ORDERS["sequence first"]))
    ewc.estimate_fisher(zeros, F.cross_entropy)


def test_sequence_first_loader():
    """Batches that do not have the samples first are refused, even with as many tokens as samples."""

    class First(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.fc(x)).mean(0))

    for tokens in (4, 6, 8):
        _, ewc = adapted(First())
        x, y = data(4, tokens)
        loader = [(x.transpose(0, 1), y)]
        with pytest.raises(FisherError, match=r"fc: |output: has 4 leading rows"):
            ewc.estimate_fisher(loader, F.cross_entropy, batch_size_fn=lambda _: 4)
        if tokens != 4:
            with pytest.raises(ArgumentError, match=f"x has {tokens}, targets has 4"):
                ewc.estimate_fisher(loader, F.cross_entropy)


@pytest.mark.parametrize("by_hand", [False, True])
def test_cost(by_hand):
    """Two forwards of one sample in a whole pass, none without the check; neither counts as a call of the
    layers nor draws from the random numbers."""
    for check in (True, False):
        model, ewc = adapted(Net(*ORDERS["windows first"]))
        batches = [data(4), data(4, seed=1), data(3, seed=2)]
        model.eval()
        state = torch.get_rng_state()
        if by_hand:
            with ewc.accumulate_fisher(batch_size=None if check else 4, check_samples=check) as running:
                for x, y in batches:
                    running.batch_size = len(y)
                    F.cross_entropy(model(x), y).backward()
        else:
            ewc.estimate_fisher(batches, F.cross_entropy, check_samples=check)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.calls == Counter({4: 2, 3: 1, **({1: 2} if check else {})})
        assert model.fc.forward_calls == 3


def test_mode_batch_is_not_checked():
    """Mode "batch" runs no further forwards."""
    model, ewc = adapted(Net(), fisher_mode="batch")
    ewc.end_task([data(4)], F.cross_entropy)
    assert model.calls == Counter({4: 1})


def test_not_alone():
    """A model that cannot run on one sample is refused in words, and taken without the check."""

    class Pairs(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise RuntimeError("expected pairs")
            return super().forward(x)

    _, ewc = adapted(Pairs())
    refused(_, ewc, r"cannot run on one sample .*expected pairs.*check_samples=False")
    ewc.estimate_fisher([data(4)], F.cross_entropy, check_samples=False)


def test_nothing_to_cut():
    """A batch without any tensor of N leading rows is refused in words."""
    _, ewc = adapted(Net())
    with pytest.raises(FisherError, match=r"one of 3 samples alone .* \[\[4, 4, 6\], \[4\]\]"):
        ewc.estimate_fisher([data(4)], F.cross_entropy, batch_size_fn=lambda batch: 3)


class Noisy(Net):
    """Draws noise, also in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def test_random_forward():
    """Where contents are random, shapes decide; several orders that fit a shape are refused."""
    _, ewc = adapted(Noisy(*ORDERS["sequence first"]))
    ewc.end_task([data(4, 3)], F.cross_entropy)
    refused(*adapted(Noisy(*ORDERS["rows"])), "fc: .* draws random numbers")


def test_train_mode():
    """By hand in train mode dropout gives no false alarm, the orders are right, buffers and modes stay."""

    class Dropping(Net):
        def __init__(self, *functions) -> None:
            super().__init__(*functions)
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x + 0 * self.drop(x)))

    plain, (x, y) = Dropping(*ORDERS["windows first"]), data(5)
    model, ewc = adapted(plain)
    model.train()
    with pytest.raises(FisherError, match="norm: batch normalisation in train mode"), ewc.accumulate_fisher():
        model(x)
    model.norm.eval().reset_running_stats()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ewc.accumulate_fisher():
        F.cross_entropy(model(x), y).backward()
    assert model.drop.training and not model.norm.training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert_right(ewc, plain, [(x, y)])
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Rounding in a deep model gives no false alarm."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(6)]
            self.layers, self.head = nn.Sequential(*layers), nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x.to(dtype).transpose(0, 1)).mean(0)).float()

    torch.manual_seed(0)
    model = Deep().to(dtype)
    inject(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    EWC(model).end_task([(torch.randn(4, 8, 16), torch.randint(0, CLASSES, (4,)))], F.cross_entropy)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    """Orders are found under activation checkpointing."""

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            return torch.utils.checkpoint.checkpoint(run, x.requires_grad_(), use_reentrant=reentrant)

    x, y = data(4, 6)
    plain = Net(*ORDERS["time rows"])
    torch.manual_seed(0)
    checkpointed = Checkpointed(*ORDERS["time rows"])
    checkpointed.load_state_dict(plain.state_dict())
    _, ewc = adapted(checkpointed)
    ewc.estimate_fisher([(x.clone(), y)], F.cross_entropy)
    assert_right(ewc, plain, [(x, y)])
