# SPDX-License-Identifier: Apache-2.0
"""Fisher passes over a model: F of k and v of every block, sums of squares of per-sample gradients of a
summed loss. `EWC.estimate_fisher`, a loop with batches of one, and the libraries for per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe

from . import extras, models, registry
from .case import OURS, Case, Provider, Run
from .models import Subject
from .place import Place
from .shapes import Model
from .workload import Workload, model_of

TOLERANCE = 1e-3  # of sums of squares of gradients that went through all blocks in fp32
Batches = list[tuple[Tensor, Tensor]]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _with_trained_qkv(model: nn.Module) -> tuple[nn.Module, list[Any]]:
    """The base model as peers need it: the packed projections require gradients, all of their rows."""
    base: Any = models.sharing(model)
    base.head.requires_grad_(False)
    layers = []
    for block in base.blocks:
        block.attn.qkv.weight = nn.Parameter(block.attn.qkv.weight.detach())
        layers.append(block.attn.qkv)
    return base, layers


def _kv(square_sums: list[Tensor]) -> list[Tensor]:
    """Rows of k and v of packed sums, as the adapters own them."""
    return [part for s in square_sums for part in s.chunk(3)[1:]]


def _ours(base: Subject, batches: Batches) -> Run:
    model = models.adapted(base, std=0.0).model
    model.head.requires_grad_(False)

    def run() -> list[Tensor]:
        ewc = fe.EWC(model, fisher_mode="sample", check_finite=False)
        ewc.estimate_fisher(batches, nn.CrossEntropyLoss(reduction="sum"), progress=False)
        return [t for name, t in ewc.state_dict()["tensors"].items() if name.startswith("task.")]

    return run


def _loop(base: Subject, batches: Batches, wide: bool = False) -> Run:
    model, layers = _with_trained_qkv(base.model)
    if wide:
        model, layers = models.in_fp64(model, layers)
    weights = [layer.weight for layer in layers]

    def run() -> list[Tensor]:
        sums = [torch.zeros_like(w) for w in weights]
        for x, labels in batches:
            for n in range(len(x)):
                sample = x[n : n + 1].to(weights[0].dtype)
                gradients = torch.autograd.grad(_loss(model(sample), labels[n : n + 1]), weights)
                for total, gradient in zip(sums, gradients, strict=True):
                    total.addcmul_(gradient, gradient)
        return _kv(sums)

    return run


def _summed(batches: Batches, of_batch: Callable[[Tensor, Tensor], list[Tensor]]) -> Run:
    """`of_batch` gives the sums of squares of one batch; a run adds them up over all."""

    def run() -> list[Tensor]:
        sums = of_batch(*batches[0])
        for x, labels in batches[1:]:
            for total, more in zip(sums, of_batch(x, labels), strict=True):
                total += more
        return _kv(sums)

    return run


def _backpack(base: Subject, batches: Batches) -> Run:
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


def _opacus(base: Subject, batches: Batches) -> Run:
    opacus = extras.load("opacus")
    model, layers = _with_trained_qkv(base.model)
    sampled = opacus.GradSampleModule(model, loss_reduction="sum", strict=False)

    def of_batch(x: Tensor, labels: Tensor) -> list[Tensor]:
        sampled.zero_grad()
        _loss(sampled(x), labels).backward()
        return [layer.weight.grad_sample.square().sum(0) for layer in layers]

    return _summed(batches, of_batch)


def build(workload: Workload, place: Place) -> Case:
    """One case, on a vision transformer."""
    samples, count, model = workload.size("samples"), workload.size("batches"), model_of(workload)
    assert isinstance(model, Model)
    base = models.vision(
        model,
        workload.size("blocks"),
        samples * count,
        workload.size("tokens"),
        workload.size("rank"),
        place.device,
    )
    batches = list(zip(base.x.split(samples), base.labels.split(samples), strict=True))
    return Case.of(
        workload,
        providers=[
            Provider(
                OURS,
                _ours(base, batches),
                "ours",
                place.entries(workload.part)[0].recorded,
                "EWC.estimate_fisher",
            ),
            Provider(registry.LOOP, _loop(base, batches)),
            Provider(registry.BACKPACK, extras.lazily(lambda: _backpack(base, batches))),
            Provider(registry.OPACUS, extras.lazily(lambda: _opacus(base, batches))),
        ],
        truth=lambda: _loop(base, batches, wide=True)(),
        tolerance=TOLERANCE,
        product=place.single,
    )
