# SPDX-License-Identifier: Apache-2.0
"""The checks of one architecture, and the record that they give."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused_ewclora as fe

from . import oracle
from .architecture import Architecture, floats, rows

# Everything is fp64, but many models compute norms, rotary embeddings or softmax in fp32 all the same.
TOLERANCE = 1e-5
SAMPLES = 9  # the largest batch
RIGHT, REFUSED, WRONG, NOTHING = "right", "refused", "WRONG", "-"


@dataclass(frozen=True)
class Outcome:
    """error: the largest relative error. text: the sentence of a refusal, or what is wrong."""

    status: str
    error: float | None = None
    text: str = ""


@dataclass
class Record:
    """One line of the raw data."""

    library: str
    architecture: str
    task: str
    layers: int = 0
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    order = (NOTHING, RIGHT, REFUSED, WRONG)
    return max(
        outcomes, key=lambda one: (order.index(one.status), one.error or 0.0), default=Outcome(NOTHING)
    )


def guarded(check: Callable[[], Outcome]) -> Outcome:
    """An error of ours is a refusal; any other is as wrong as a wrong number."""
    try:
        return check()
    except fe.EWCLoRAError as error:
        return Outcome(REFUSED, None, f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome(WRONG, None, f"{type(error).__name__}: {error}")


def compared(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> Outcome:
    """Relative errors per name; entries that vanish beside the others are compared with the largest."""
    if missing := [name for name in wanted if found.get(name) is None]:
        return Outcome(WRONG, 1.0, f"nothing for {missing[0]} and {len(missing) - 1} more")
    largest = max((w.norm().item() for w in wanted.values()), default=0.0)
    errors = {
        name: (found[name].detach() - w).norm().item() / max(w.norm().item(), 1e-10 * largest, 1e-300)
        for name, w in wanted.items()
    }
    name = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    error = errors[name]
    if error < TOLERANCE:
        return Outcome(RIGHT, error)
    wrong = sum(not e < TOLERANCE for e in errors.values())
    return Outcome(WRONG, error, f"{name} is off by {error:.2g}, {wrong} of {len(errors)} are off")


class Subject:
    """An adapted model with its dense twin, the data, and the gradients of every sample."""

    def __init__(
        self, architecture: Architecture, plain: nn.Module, record: Record, target: str | None = None
    ) -> None:
        self.architecture, self.plain, self.record = architecture, plain, record
        torch.manual_seed(1)
        self.inputs, self.targets = architecture.inputs(SAMPLES), architecture.targets(SAMPLES)
        one = rows(self.inputs, 0, 2), self.targets[:2]
        targets: Any = [target] if target else architecture.targets_of_adapters
        unused = [] if target else oracle.unused_layers(architecture, plain, *one)
        if unused:
            record.left_out["no part in the loss"] = unused
        excluded = "|".join(map(re.escape, unused)) if unused else None
        self.adapted = copy.deepcopy(plain)
        report = fe.inject(self.adapted, fe.LoRAConfig(r=2, target_modules=targets, exclude_modules=excluded))
        self.skipped: dict[str, str] = report.summary["skipped"]
        self.names = list(fe.adapters(self.adapted))
        record.layers = len(self.names)
        with torch.no_grad():
            for layer in fe.adapters(self.adapted).values():
                for _, _, lora_b in layer.adapter_parameters():
                    lora_b.normal_(0, 0.3)
        self.dense = oracle.dense_twin(plain, self.adapted)
        self.samples = oracle.sample_gradients(
            self.dense, oracle.weights_of(self.adapted), architecture.loss, self.inputs, self.targets
        )

    def first(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        return rows(self.inputs, 0, count), self.targets[:count]

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            str(i): t.detach() for i, t in enumerate(floats(self.architecture.call(model, self.first(4)[0])))
        }

    def batches(self) -> list[list[int]]:
        """Sizes of batches: two of 2, one of 4, and one that divides the tokens of a sample."""
        counts = oracle.tokens_of(self.architecture, self.adapted, self.first(1)[0])
        sizes = (n for n in range(3, SAMPLES + 1) if n != 4 and any(count % n == 0 for count in counts))
        found = next(sizes, None)
        return [[2, 2], [4], *([[found]] if found else [])]


def check_forward(subject: Subject) -> Outcome:
    """In eval, with and without gradients, and in train mode with the same dropout."""
    outcomes = []
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            outcomes.append(compared(subject.outputs(subject.adapted), subject.outputs(subject.dense)))
    outcomes += in_training(subject)
    return worst(outcomes)


@torch.no_grad()
def in_training(subject: Subject) -> list[Outcome]:
    """In train mode with one seed, where the dense copy repeats its outputs; if they differ, which the masks
    of dropout also do in another memory layout, without dropout."""

    def outputs(model: nn.Module, dropout: bool) -> dict[str, Tensor]:
        one = copy.deepcopy(model).train()
        for module in one.modules() if not dropout else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        torch.manual_seed(2)
        return subject.outputs(one)

    wanted = outputs(subject.dense, True)
    if compared(outputs(subject.dense, True), wanted).status != RIGHT:
        return []
    outcome = compared(outputs(subject.adapted, True), wanted)
    if outcome.status != RIGHT:
        outcome = compared(outputs(subject.adapted, False), outputs(subject.dense, False))
    return [outcome]


def check_gradients(subject: Subject) -> Outcome:
    """dA = s B^T G and dB = s G A^T for G the mean over four samples of one-sample gradients."""
    model = copy.deepcopy(subject.adapted)
    inputs, targets = subject.first(4)
    (subject.architecture.loss(model, inputs, targets) / 4).backward()
    dense = oracle.mean(subject.samples[:4])
    found, wanted = {}, {}
    for name, layer in fe.adapters(model).items():
        ((piece, lora_a, lora_b),) = layer.adapter_parameters()
        found |= {f"{name}.A": lora_a.grad, f"{name}.B": lora_b.grad}
        with torch.no_grad():
            wanted[f"{name}.A"] = piece.scaling * lora_b.T @ dense[name]
            wanted[f"{name}.B"] = piece.scaling * dense[name] @ lora_a.T
    return compared(found, wanted)


@dataclass(frozen=True)
class FisherRun:
    """The Fisher of one loader, and the model after the task has ended."""

    sizes: list[int]
    mode: str
    own: bool = False

    def run(self, subject: Subject, samples: list[oracle.Gradients]) -> tuple[Outcome, Outcome]:
        """(Fisher, merge)."""
        architecture = subject.architecture
        ewc = fe.EWC(
            copy.deepcopy(subject.adapted), ewc_lambda=1.0, fisher_mode=self.mode, fisher_dtype=torch.float64
        )
        loader, of_batches, start = [], [], 0
        for size in self.sizes:
            stop = start + size
            batch = rows(subject.inputs, start, stop), subject.targets[start:stop]
            loader.append(architecture.own_batch(*batch) if self.own else batch)
            of_batches.append(samples[start:stop])
            start = stop
        fisher = guarded(
            lambda: self._fisher(ewc, architecture, loader, oracle.fisher(of_batches, self.mode))
        )
        if fisher.text:
            fisher = Outcome(fisher.status, fisher.error, f"batches {self.sizes}: {fisher.text}")
        if fisher.status == REFUSED or not ewc.fishers:
            return fisher, Outcome(NOTHING)
        with torch.no_grad():
            return fisher, guarded(
                lambda: compared(subject.outputs(ewc.model), subject.outputs(subject.dense))
            )

    def _fisher(
        self, ewc: fe.EWC, architecture: Architecture, loader: list[Any], wanted: oracle.Gradients
    ) -> Outcome:
        if self.own:
            ewc.end_task(loader)
        else:
            ewc.end_task(
                loader,
                lambda output, targets: architecture.task.loss(output, targets) / len(targets),
                forward=lambda model, batch: (architecture.call(model, batch[0]), batch[1]),
            )
        return compared(ewc.fishers, wanted)


def check_fisher(subject: Subject, mode: str, own: bool = False) -> tuple[Outcome, Outcome]:
    """(worst Fisher, worst merge) over the sizes of batches."""
    samples = subject.samples
    if own and subject.architecture.task.own == "model":
        samples = oracle.sample_gradients(
            subject.dense,
            oracle.weights_of(subject.adapted),
            subject.architecture.own_loss,
            *subject.first(4),
        )
    sizes = [[2, 2], [4]] if own else subject.batches()
    found = [FisherRun(one, mode, own).run(subject, samples) for one in sizes]
    return worst(fisher for fisher, _ in found), worst(merge for _, merge in found)


def check_merge(subject: Subject) -> Outcome:
    """What fe.merge leaves of the output, where no task could end."""
    model = copy.deepcopy(subject.adapted)
    fe.merge(model)
    with torch.no_grad():
        return compared(subject.outputs(model), subject.outputs(subject.dense))


def alone(subject: Subject) -> Outcome:
    """Every layer as the only adapted one: where one refuses, the Fisher of others could still be wrong."""
    outcomes = {}
    for name in subject.names:
        record = Record(subject.architecture.library, name, "")
        one = Subject(subject.architecture, subject.plain, record, name)
        outcomes[name] = check_fisher(one, "sample")[0]
    counts = [
        (status, [name for name, one in outcomes.items() if one.status == status])
        for status in (RIGHT, REFUSED, WRONG)
    ]
    parts = [f"{status}: {len(names)} ({names[0]})" for status, names in counts if names]
    subject.record.notes.append("Fisher per sample of single layers: " + ", ".join(parts))
    return worst(outcomes.values())


def unnamed(outcome: Outcome, names: list[str]) -> Outcome:
    """A refusal has to name a layer."""
    if outcome.status != REFUSED or any(name in outcome.text for name in names):
        return outcome
    return Outcome(WRONG, None, f"the error names no layer: {outcome.text}")


def note_left_out(subject: Subject) -> None:
    """Matrices without adapters, by the reason in the report; those that it does not mention as well."""
    left_out = subject.record.left_out
    for name, reason in subject.skipped.items():
        left_out.setdefault(reason, []).append(name)
    adapted = {weight.parameter for weight in oracle.weights_of(subject.adapted).values()}
    known = adapted.union(subject.names, *left_out.values())
    used = oracle.matrices(subject.architecture, subject.plain, subject.first(1)[0])
    for path, aliases in sorted(used.items()):
        parents = {a.rsplit(".", depth)[0] for a in aliases for depth in range(a.count(".") + 1)}
        if not parents & known:
            left_out.setdefault("not reported", []).append(path)


def run(architecture: Architecture) -> Record:
    """All checks of one architecture."""
    record = Record(architecture.library, architecture.name, architecture.task.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = architecture.build()
        try:
            subject = Subject(architecture, plain, record)
        except fe.TargetError as error:
            record.notes.append(f"{type(error).__name__}: {error}")
            return record
        if architecture.targets_of_adapters == "all-linear":
            note_left_out(subject)
        outcomes = {
            "forward": guarded(lambda: check_forward(subject)),
            "gradients": guarded(lambda: check_gradients(subject)),
        }
        merges = []
        if architecture.mixes:
            record.notes.append(f"no gradients of single samples: {architecture.mixes}")
            outcomes["fisher_sample"] = outcomes["fisher_own_loss"] = Outcome(NOTHING)
        else:
            outcomes["fisher_sample"], outcomes["fisher_own_loss"], merged = _per_sample(subject)
            merges.append(merged)
        batch, merged = check_fisher(subject, "batch")
        outcomes["fisher_batch"] = unnamed(batch, subject.names)
        merges.append(merged)
        if all(one.status == NOTHING for one in merges):
            merges.append(guarded(lambda: check_merge(subject)))
        outcomes["merge"] = worst(merges)
        record.checks = {name: asdict(outcome) for name, outcome in outcomes.items()}
    return record


def _per_sample(subject: Subject) -> tuple[Outcome, Outcome, Outcome]:
    """(Fisher with an explicit loss, Fisher without loss_fn, merge)."""
    sample, merged = check_fisher(subject, "sample")
    explicit = unnamed(sample, subject.names)
    if sample.status == REFUSED and (single := alone(subject)).status == WRONG:
        explicit = single
    own = Outcome(NOTHING)
    if subject.architecture.task.own is not None:
        own, _ = check_fisher(subject, "sample", own=True)
    return explicit, own, merged
