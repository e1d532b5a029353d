"""Whole training steps and whole Fisher passes of models with random weights, and what they spend time on.

A step is forward, penalty, backward and SGD at learning rate 0: the work of a step, with parameters that stay
what the check compared. `blocks` in the shape says how much of the depth of the model there is.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora import profiling

from . import extras, models, registry
from .case import OURS, Case, Provider, Run
from .ewc_penalty import eager, fused
from .harness import Record
from .models import Factors, Subject
from .registry import TINY, Shape, Workload
from .shapes import LLAMA, RELEASE

OPS = ("training_step", "fisher_pass")
WITHOUT, FROZEN = "LoRA without EWC", "frozen base"
TOLERANCE = 1e-3  # of gradients that went through all blocks in fp32
TOLD = 12  # operations that a breakdown names; the others are summed up
VISION = {m.name: m for m in (*registry.VITS, TINY)}
PENALTIES = {OURS: fused, registry.EXPLICIT: eager}


def plan(preset: str) -> list[Workload]:
    """Training steps and Fisher passes of a preset."""
    if preset == "quick":
        return [_step(TINY.name, 1, 2, 5, 4), _pass(TINY.name, 1, 2, 2, 5, 4)]
    if preset == "cpu":
        return [
            _step("ViT-B/16", 12, 2, 197, 10), _step("ViT-L/16", 6, 2, 197, 10),
            _step(LLAMA.name, 2, 1, 256, 16), _pass("ViT-B/16", 2, 4, 2, 197, 10),
        ]  # fmt: skip
    steps = [_step(m.name, m.depth, n, m.tokens, 10) for m in (RELEASE.base, RELEASE.large) for n in (16, 64)]
    whole = _step(LLAMA.name, LLAMA.depth, 1, LLAMA.tokens, 16)
    return [*steps, whole, _pass("ViT-B/16", 12, 16, 4, 197, 10), _pass("ViT-L/16", 24, 16, 4, 197, 10)]


def _step(model: str, blocks: int, samples: int, tokens: int, rank: int) -> Workload:
    shape: Shape = {"model": model, "blocks": blocks, "samples": samples, "tokens": tokens, "rank": rank}
    return Workload("training_step", {**shape, "optimizer": "SGD"}, "float32")


def _pass(model: str, blocks: int, samples: int, batches: int, tokens: int, rank: int) -> Workload:
    shape: Shape = {
        "model": model, "blocks": blocks, "samples": samples, "batches": batches, "tokens": tokens,
        "width": VISION[model].width, "rank": rank,
    }  # fmt: skip
    return Workload("fisher_pass", shape, "float32")


def build(one: Workload) -> Case:
    """One case; raises `Unavailable` where the library of the model is missing."""
    return (build_step if one.op == "training_step" else build_pass)(one)


def subject(one: Workload, samples: int) -> Subject:
    """The model of a workload and a batch."""
    blocks, rank, tokens = one.size("blocks"), one.size("rank"), one.size("tokens")
    if one.shape["model"] == LLAMA.name:
        return models.text(LLAMA, blocks, samples, tokens, rank)
    model = VISION[str(one.shape["model"])]
    side = round((tokens - 1) ** 0.5)  # patches per side, beside the class token
    patch = int(model.name.partition("/")[2] or 4)
    return models.vision(model, blocks, samples, rank, side * patch, patch)


# Training steps


def _gradients(
    model: Any, factors: Factors, fishers: list[Tensor], x: Tensor, labels: Tensor, name: str
) -> list[Tensor]:
    """Of the loss in all that trains: the adapters, and the head."""
    loss = F.cross_entropy(model(x), labels)
    if name in PENALTIES:
        loss = loss + PENALTIES[name](fishers, factors.lora_as, factors.lora_bs)
    return list(torch.autograd.grad(loss, [*factors.pairs(), *model.head.parameters()]))


def _training(
    name: str, role: str, made: tuple[Any, Factors], fishers: list[Tensor], base: Subject
) -> Provider:
    model, factors = made
    parameters = [*factors.pairs(), *model.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0, foreach=True)

    def run() -> list[Tensor]:
        found = _gradients(model, factors, fishers, base.x, base.labels, name)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return found

    backend = "cpu" if role == "ours" or name == WITHOUT else ""
    return Provider(name, run, role, backend, "whole step, SGD")


def build_step(one: Workload) -> Case:
    """The head alone, LoRA without a penalty, the published formulation, and ours; the first two do less than
    the case and are floors."""
    base = subject(one, one.size("samples"))
    ours = models.adapted(base)
    published = models.explicit(base, ours[0])
    # The size of a gradient of the penalty should be that of one of the loss, so that the check sees both.
    pairs = zip(ours[1].lora_as, ours[1].lora_bs, strict=True)
    fishers = [torch.rand(len(b), a.shape[1]).square_().mul_(1e-2) for a, b in pairs]

    def truth() -> list[Tensor]:
        wide, factors = models.in_fp64(*published)
        fishers64 = [f.double() for f in fishers]
        return _gradients(wide, factors, fishers64, base.x.double(), base.labels, registry.EXPLICIT)

    frozen = (models.sharing(base.model), Factors([], []))
    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            _training(OURS, "ours", ours, fishers, base),
            _training(registry.EXPLICIT, "peer", published, fishers, base),
            _training(WITHOUT, "floor", ours, fishers, base),
            _training(FROZEN, "floor", frozen, fishers, base),
        ],
        truth=truth,
        tolerance=TOLERANCE,
    )


# Fisher passes: F of k and v of every block, sums of squares of per-sample gradients of a summed loss


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _with_trained_qkv(model: nn.Module) -> tuple[nn.Module, list[Any]]:
    """The base model as peers need it: the packed projections require gradients, all of their rows."""
    base: Any = models.sharing(model)
    base.head.requires_grad_(False)
    found = []
    for block in base.blocks:
        block.attn.qkv.weight = nn.Parameter(block.attn.qkv.weight.detach())
        found.append(block.attn.qkv)
    return base, found


def _kv(square_sums: list[Tensor]) -> list[Tensor]:
    """Rows of k and v of packed sums, as the adapters own them."""
    return [part for s in square_sums for part in s.chunk(3)[1:]]


def _ours(base: Subject, batches: list[tuple[Tensor, Tensor]]) -> Run:
    model, _ = models.adapted(base, std=0.0)
    model.head.requires_grad_(False)

    def run() -> list[Tensor]:
        ewc = fe.EWC(model, fisher_mode="sample", check_finite=False)
        ewc.estimate_fisher(batches, _loss, progress=False, reduction="sum")
        task = ewc._state.task  # what was gathered is public only after consolidation, which changes weights
        assert task is not None
        return list(task.buffers.values())

    return run


def _loop(base: Subject, batches: list[tuple[Tensor, Tensor]], wide: bool = False) -> Run:
    model, layers = _with_trained_qkv(base.model)
    if wide:
        model, layers = models.in_fp64(model, layers)
    weights = [layer.weight for layer in layers]

    def run() -> list[Tensor]:
        sums = [torch.zeros_like(w) for w in weights]
        for x, labels in batches:
            for n in range(len(x)):
                one = x[n : n + 1].to(weights[0].dtype)
                found = torch.autograd.grad(_loss(model(one), labels[n : n + 1]), weights)
                for total, gradient in zip(sums, found, strict=True):
                    total.addcmul_(gradient, gradient)
        return _kv(sums)

    return run


def _summed(batches: list[tuple[Tensor, Tensor]], of_batch: Callable[[Tensor, Tensor], list[Tensor]]) -> Run:
    """`of_batch` gives the sums of squares of one batch; a run adds them up over all."""

    def run() -> list[Tensor]:
        sums = of_batch(*batches[0])
        for x, labels in batches[1:]:
            for total, more in zip(sums, of_batch(x, labels), strict=True):
                total += more
        return _kv(sums)

    return run


def _backpack(base: Subject, batches: list[tuple[Tensor, Tensor]]) -> Run:
    backpack = extras.load("backpack")
    model, layers = _with_trained_qkv(base.model)
    for layer in layers:
        backpack.extend(layer)

    def of_batch(x: Tensor, labels: Tensor) -> list[Tensor]:
        model.zero_grad()
        with backpack.backpack(backpack.extensions.SumGradSquared()):
            _loss(model(x), labels).backward()
        return [layer.weight.sum_grad_squared for layer in layers]

    return _summed(batches, of_batch)


def _opacus(base: Subject, batches: list[tuple[Tensor, Tensor]]) -> Run:
    opacus = extras.load("opacus")
    model, layers = _with_trained_qkv(base.model)
    sampled = opacus.GradSampleModule(model, loss_reduction="sum", strict=False)

    def of_batch(x: Tensor, labels: Tensor) -> list[Tensor]:
        sampled.zero_grad()
        _loss(sampled(x), labels).backward()
        return [layer.weight.grad_sample.square().sum(0) for layer in layers]

    return _summed(batches, of_batch)


def build_pass(one: Workload) -> Case:
    """`EWC.estimate_fisher`, a loop with batches of one, and the libraries for per-sample gradients."""
    samples, count = one.size("samples"), one.size("batches")
    base = subject(one, samples * count)
    batches = list(zip(base.x.split(samples), base.labels.split(samples), strict=True))
    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            Provider(OURS, _ours(base, batches), "ours", "cpu", "EWC.estimate_fisher"),
            Provider(registry.LOOP, _loop(base, batches)),
            Provider(registry.BACKPACK, extras.lazily(lambda: _backpack(base, batches))),
            Provider(registry.OPACUS, extras.lazily(lambda: _opacus(base, batches))),
        ],
        truth=lambda: _loop(base, batches, wide=True)(),
        tolerance=TOLERANCE,
    )


# Breakdowns


def _operation(event: Any) -> str:
    """The outermost operation of this library around an event (its op or its range), else the event's own
    name."""
    name, parent = str(event.name), event
    while parent is not None:
        if str(parent.name).startswith("fused_ewclora"):
            name = str(parent.name).partition("(")[0].replace("::", ".").removesuffix("_")
        parent = parent.cpu_parent
    return name


def breakdown(run: Run) -> dict[str, float]:
    """Shares of the CPU time of one call by operation, the most expensive first, under torch.profiler, whose
    own cost per operation is in them."""
    with (
        profiling.enable(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        run()
    spent: collections.Counter[str] = collections.Counter()
    for event in profile.events():
        spent[_operation(event)] += max(0.0, event.self_cpu_time_total)
    total = sum(spent.values()) or 1.0
    shares = {name: round(value / total, 4) for name, value in spent.most_common(TOLD)}
    return {**shares, "other": round(max(0.0, 1.0 - sum(shares.values())), 4)}


def add_breakdowns(case: Case, records: list[Record]) -> None:
    """Gives every measured record of the case its breakdown."""
    runs = {provider.name: provider.run for provider in case.providers}
    for record in records:
        if "seconds" in record and record["provider"] in runs:
            record["breakdown"] = breakdown(runs[record["provider"]])
