# SPDX-License-Identifier: Apache-2.0
"""What the EWC controller refuses, and that nothing has changed then."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Tiny, adapted, assert_same, data, layers, randomise, snapshot
from torch import nn

from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import ArgumentError, DtypeError, FisherError, TargetError
from fused_ewclora.ewc import consolidate, fold
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.settings import convert_lambda
from fused_ewclora.ewc.structures.dense import Dense
from fused_ewclora.layers.inject import disabled, inject, merge, unmerge
from fused_ewclora.layers.linear import LoRALinear


@pytest.fixture
def second_task():
    """A model with a Fisher of one task, and that of the second gathered."""
    model = adapted()
    ewc = EWC(model, fisher_dtype=torch.float64, merge_mode="factors")
    x, y = data(6)
    ewc.end_task([(x, y)], F.cross_entropy)
    randomise(model)
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    return model, ewc


def state_of(model, ewc):
    counts = [layer.consolidated_tasks for layer in layers(model)]
    return snapshot(model, ewc.state_dict()["tensors"]), (copy.deepcopy(ewc.state_dict()["config"]), counts)


def assert_unchanged(before, model, ewc):
    after = state_of(model, ewc)
    assert_same(before[0], after[0])
    assert before[1] == after[1]
    assert all(layer.fisher_capture is None for layer in layers(model))


class Injected(Exception):
    pass


def fail_on_call(monkeypatch, owner, name, number):
    """The `number`-th call (from 1) of owner.name raises; later ones work, as the roll-back needs."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Injected(f"call {number} of {name}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


FAILURES = [
    (torch.Tensor, "copy_", 2), (torch.Tensor, "copy_", 4), (torch.Tensor, "clone", 5),
    (torch.Tensor, "clone", 9), (torch.Tensor, "uniform_", 2), (torch.Tensor, "zero_", 3),
    (LoRALinear, "reset_adapters", 1), (LoRALinear, "reset_adapters", 2), (Dense, "joined", 3),
    (consolidate, "weights_of_sums", 1), (fold, "check_finite", 1), (consolidate, "TaskRecord", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "number"), FAILURES, ids=[f"{o.__name__}.{n}-{k}" for o, n, k in FAILURES]
)
def test_consolidation_atomic(second_task, monkeypatch, owner, name, number):
    """Consolidation is all or nothing, wherever it fails."""
    model, ewc = second_task
    before = state_of(model, ewc)
    with monkeypatch.context() as patch:
        fail_on_call(patch, owner, name, number)
        with pytest.raises(Injected):
            ewc.consolidate()
    assert_unchanged(before, model, ewc)
    ewc.consolidate()  # and works once the cause is gone
    assert ewc.tasks == 2


def test_interrupt_rolled_back(second_task, monkeypatch):
    """An interrupt in the middle of copying is rolled back too."""
    model, ewc = second_task
    before = state_of(model, ewc)
    original = LoRALinear.reset_adapters

    def interrupted(self, generator=None):
        original(self, generator)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "reset_adapters", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ewc.consolidate()
    assert_unchanged(before, model, ewc)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["lora_A_v", "lora_B_k", "fisher"])
def test_nan_stops_consolidation(second_task, bad, where):
    """Values that are not finite stop a consolidation."""
    model, ewc = second_task
    with torch.no_grad():
        target = ewc.fishers["fc"] if where == "fisher" else getattr(model.qkv, where)
        target.view(-1)[3] = bad
    before = state_of(model, ewc)
    with pytest.raises(FisherError, match=r"consolidate: .*(qkv|fc).*finite.*nothing was changed"):
        ewc.consolidate()
    assert_unchanged(before, model, ewc)


def test_tied_weights():
    """A weight that another module shares is never consolidated."""
    model = adapted()
    ewc = EWC(model)
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    model.other = nn.Linear(6, 6)
    model.other.weight = model.fc.weight
    before = state_of(model, ewc)
    with pytest.raises(TargetError, match=r"'fc' is also other\.weight"):
        ewc.consolidate()
    assert_unchanged(before, model, ewc)


def test_consolidation_without_fisher():
    """Consolidation without a Fisher says what to call first."""
    model = adapted()
    ewc = EWC(model)
    before = state_of(model, ewc)
    with pytest.raises(FisherError, match="estimate_fisher"):
        ewc.consolidate()
    assert_unchanged(before, model, ewc)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan, "1", True])
def test_gamma_out_of_range(second_task, gamma):
    """A gamma outside its range is refused before anything runs."""
    model, ewc = second_task
    before = state_of(model, ewc)
    for call in (lambda: ewc.consolidate(gamma), lambda: ewc.end_task([], F.cross_entropy, gamma=gamma)):
        with pytest.raises(ArgumentError, match="gamma"):
            call()
    assert_unchanged(before, model, ewc)


BAD_ESTIMATES = [
    ("labels", [()], {"labels": "true"}, ArgumentError),
    ("labels", [()], {"labels": "exact", "mode": "batch"}, ArgumentError),
    ("reduction", [()], {"reduction": "none"}, ArgumentError),
    ("max_batches", [()], {"max_batches": 0}, ArgumentError),
    ("max_batches", [()], {"max_batches": 1.5}, ArgumentError),
    ("loader is empty", [], {}, FisherError),
    ("loader is empty", [()], {"empty": True}, FisherError),
    (
        "loss_fn: expected a scalar",
        [()],
        {"loss_fn": lambda o, y: F.cross_entropy(o, y, reduction="none")},
        FisherError,
    ),
    ("loss_fn: expected a scalar", [()], {"loss_fn": lambda o, y: 1.0}, FisherError),
    ("without a gradient", [()], {"loss_fn": lambda o, y: o.sum().detach()}, FisherError),
    ("loader: expected batches", [()], {"triple": True}, ArgumentError),
    ("targets", [()], {"unlabelled": True, "loss_fn": None}, ArgumentError),
    ("logits: expected", [()], {"labels": "exact", "logits_fn": lambda o: o[:, None]}, FisherError),
    ("logits_fn", [()], {"labels": "exact", "logits_fn": None}, ArgumentError),
]


@pytest.mark.parametrize(("message", "loader", "options", "error"), BAD_ESTIMATES)
def test_impossible_estimate(message, loader, options, error):
    """Estimates that cannot work say why and change nothing."""
    options = dict(options)
    model = adapted()
    x, y = data(0 if options.pop("empty", False) else 4)
    batch = (x, y)
    if options.pop("triple", False):
        batch = (x, y, y)
    if options.pop("unlabelled", False):
        batch = (x,)
    if "logits_fn" in options and options["logits_fn"] is None:
        options.pop("logits_fn")
        options["forward"] = lambda m, b: ({"no logits": m(b[0])}, b[1])
    ewc = EWC(model, fisher_mode=options.pop("mode", "sample"))
    loss_fn = options.pop("loss_fn", F.cross_entropy)
    before = state_of(model, ewc)
    with pytest.raises(error, match=message):
        ewc.estimate_fisher([batch for _ in loader], loss_fn, **options)
    assert_unchanged(before, model, ewc)


def test_failing_loader():
    """A loader that fails halfway leaves no trace."""
    model = adapted()
    ewc = EWC(model)
    x, y = data(4)

    def loader():
        yield x, y
        raise OSError("disk")

    before = state_of(model, ewc)
    with pytest.raises(OSError, match="disk"):
        ewc.estimate_fisher(loader(), F.cross_entropy)
    assert_unchanged(before, model, ewc)


class Bypassing(Tiny):
    """As timm's BEiT does: the weight is used, the module never called."""

    def block(self, x):
        return super().block(x) if self.calls == 1 else x + F.linear(x, self.qkv.weight)[..., :6] + self.fc(x)


def test_bypassed_layer():
    """A bypassed layer is named together with its remedy."""
    model = Bypassing(calls=0)
    inject(model, LoRAConfig(r=2, target_modules=["qkv", "fc"]))
    ewc = EWC(model)
    before = state_of(model, ewc)
    x, y = data(4, dtype=torch.float32)
    with pytest.raises(TargetError, match=r"qkv: .*never ran.*qkv_bias_separate=True"):
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
    assert_unchanged(before, model, ewc)


@pytest.mark.parametrize("head_trains", [True, False])
def test_all_bypassed(head_trains):
    """Where no adapted layer runs, the layers are named and the loader is not blamed."""
    model = Bypassing(calls=0)
    inject(model, LoRAConfig(r=2, target_modules=["qkv"]))
    model.head.requires_grad_(head_trains)
    ewc = EWC(model)
    x, y = data(4, dtype=torch.float32)
    before = state_of(model, ewc)
    with pytest.raises(TargetError, match=r"^qkv: the model ran on the batches.*register_call"):
        ewc.end_task([(x, y)], F.cross_entropy)
    assert_unchanged(before, model, ewc)
    with pytest.raises(FisherError, match="no forward and backward pass ran through an adapted layer"):
        ewc.end_task([], F.cross_entropy)


class BypassedInTraining(Bypassing):
    """Calls its layer in eval mode alone, where the Fisher is estimated."""

    def block(self, x):
        self.calls = 0 if self.training else 1
        return super().block(x)


def test_untrained_reported():
    """A layer that training passed by is named at the end of the first task, and only then."""
    model = BypassedInTraining(calls=1).train()
    inject(model, LoRAConfig(r=2, target_modules=["qkv", "fc"]))
    ewc = EWC(model)
    x, y = data(4, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.end_task([(x, y)], F.cross_entropy)  # nothing was trained
    model = BypassedInTraining(calls=1).train()
    inject(model, LoRAConfig(r=2, target_modules=["qkv", "fc"]))
    ewc = EWC(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"^end_task: qkv: lora_B is still zero.*qkv never ran"):
        ewc.end_task([(x, y)], F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ewc.end_task([(x, y)], F.cross_entropy)


def test_unused_output():
    """A layer whose output takes no part in the loss is named."""
    model = adapted()
    ewc = EWC(model)
    x, _ = data(4)
    with pytest.raises(FisherError, match=r"no gradient reached"), ewc.accumulate_fisher():
        model.head(model.qkv(x)[..., :6].mean(1)).sum().backward()
        model.fc(x)


def test_backward_nothing_inside():
    """A backward pass with nothing recorded inside the block is an error."""
    ewc = EWC(adapted())
    with pytest.raises(FisherError, match="no forward and backward"), ewc.accumulate_fisher():
        pass


def test_passes_do_not_nest(second_task):
    model, ewc = second_task
    before = state_of(model, ewc)
    with (
        pytest.raises(FisherError, match="another Fisher pass"),
        ewc.accumulate_fisher(),
        ewc.accumulate_fisher(),
    ):
        pass
    with pytest.raises(FisherError, match="leave its block"), ewc.accumulate_fisher():
        ewc.consolidate()
    assert_unchanged(before, model, ewc)


def test_merged_or_disabled(second_task):
    """Merged or disabled adapters have no Fisher and are not consolidated."""
    model, ewc = second_task
    x, y = data(4)
    merge(model)
    before = state_of(model, ewc)
    with pytest.raises(FisherError, match="unmerge"):
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
    with pytest.raises(TargetError, match="unmerge"):
        ewc.consolidate()
    assert_unchanged(before, model, ewc)
    unmerge(model)
    with disabled(model), pytest.raises(FisherError, match="disabled"):
        ewc.estimate_fisher([(x, y)], F.cross_entropy)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("ewc_lambda", {"ewc_lambda": -1.0}, ArgumentError),
        ("ewc_lambda", {"ewc_lambda": math.inf}, ArgumentError),
        ("gamma", {"gamma": 1.5}, ArgumentError),
        ("fisher_mode", {"fisher_mode": "token"}, ArgumentError),
        ("merge_mode", {"merge_mode": "product"}, ArgumentError),
        ("update", {"update": "mean"}, ArgumentError),
        ("fisher_dtype", {"fisher_dtype": torch.float16}, DtypeError),
        ("fisher_dtype.*fp64", {"fisher_dtype": torch.bfloat16}, DtypeError),
    ],
)
def test_constructor_arguments_are_checked(name, options, error):
    with pytest.raises(error, match=name):
        EWC(adapted(), **options)


def test_no_adapters():
    """A model without adapters is refused."""
    with pytest.raises(TargetError, match="inject"):
        EWC(nn.Linear(2, 2))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_bad_pass_arguments(batch_size):
    """Bad arguments to a pass are refused."""
    ewc = EWC(adapted())
    for options in (
        {"loss_scale": 0.0},
        {"loss_scale": math.inf},
        {"reduction": "none"},
        {"batch_size": 0},
        {"batch_size": 2.0},
    ):
        with (
            pytest.raises(ArgumentError, match=next(iter(options))),
            ewc.accumulate_fisher(**{"batch_size": batch_size, **options}),
        ):
            raise AssertionError("the block must not run")


@pytest.mark.parametrize("check", [True, False])
def test_indivisible_samples(check):
    """Sample counts that do not divide the rows are refused, and the layer is named."""
    model = adapted()
    ewc = EWC(model)
    before = state_of(model, ewc)
    x, y = data(5)
    words = r"batch_size: .* 4 samples .*\[5, 3, 6\]" if check else "batch_size: 4 samples .* 5 .* of fc"
    with (
        pytest.raises(FisherError, match=words),
        ewc.accumulate_fisher(batch_size=4, check_samples=check),
    ):
        F.cross_entropy(model(x), y).backward()
    assert_unchanged(before, model, ewc)


def broken_states():
    """(what is wrong, change of a good state, words of the message)."""
    return [
        ("not a state", lambda s: s.pop("tensors"), "state_dict"),
        ("format", lambda s: s["config"].update(format=2), "format 1"),
        ("mode", lambda s: s["config"].update(fisher_mode="batch"), "fisher_mode.*convert_lambda"),
        ("merge mode", lambda s: s["config"].update(merge_mode="delta"), "merge_mode"),
        ("missing Fisher", lambda s: s["tensors"].pop("fisher.fc"), "missing.*fc"),
        (
            "foreign Fisher",
            lambda s: s["tensors"].update({"fisher.other": torch.ones(2, 2)}),
            "unexpected.*other",
        ),
        ("foreign tensor", lambda s: s["tensors"].update(other=torch.ones(2)), "did not expect"),
        ("shape", lambda s: s["tensors"].update({"fisher.fc": torch.ones(2, 2)}), r"fc: expected.*\[6, 6\]"),
        ("dtype", lambda s: s["tensors"].update({"fisher.fc": torch.ones(6, 6).long()}), "floating-point"),
        ("NaN", lambda s: s["tensors"]["fisher.fc"].fill_(math.nan), "fc: expected finite"),
        ("negative", lambda s: s["tensors"]["fisher.fc"].fill_(-1.0), "negative"),
        ("history", lambda s: s["config"].update(history="one"), "history"),
        ("no history", lambda s: s["config"].update(history=[]), "disagree|did not expect"),
        ("record", lambda s: s["config"]["history"][0].update(samples=-1), "samples"),
        ("labels", lambda s: s["config"]["history"][0].update(labels=3), "record"),
        ("gamma", lambda s: s["config"]["history"][0].update(gamma=2.0), "gamma"),
        ("factors", lambda s: s["tensors"].pop("sum_A.qkv.k"), "sum_A"),
        ("task", lambda s: s["config"].pop("task"), "without its record"),
        ("task buffers", lambda s: s["tensors"].pop("task.fc"), "missing.*fc"),
    ]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in broken_states()], ids=[c[0] for c in broken_states()]
)
def test_bad_state(second_task, change, message):
    """States that do not fit are refused and change nothing."""
    model, ewc = second_task
    before = state_of(model, ewc)
    saved = copy.deepcopy(ewc.state_dict())
    change(saved)
    with pytest.raises(FisherError, match=message):
        ewc.load_state_dict(saved)
    assert_unchanged(before, model, ewc)


def test_bad_convert_lambda():
    """`convert_lambda` checks its arguments."""
    for arguments in (
        (-1.0, "batch", "sample", 2),
        (1.0, "b", "sample", 2),
        (1.0, "batch", "s", 2),
        (1.0, "batch", "sample", 0),
    ):
        with pytest.raises(ArgumentError):
            convert_lambda(*arguments)
