# SPDX-License-Identifier: Apache-2.0
"""Whole training steps, and forward and backward of adapted models, with random weights.

A step is forward, penalty, backward and the optimizer, with a learning rate so small that the parameters stay
those that were checked. Ours is what users call: the injected model and `EWC.penalty()`. `blocks` in the
shape is the number of blocks that the model has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ewclora.layers.inject import adapters

from . import fisher_pass, models, registry
from .case import OURS, Case, Provider, Run, Target
from .ewc_penalty import eager
from .models import Adapted, Subject
from .place import Entry, Place
from .shapes import TextModel
from .workload import SMALL, Workload, model_of
from .workloads import OF_TIMM, OF_TORCHVISION

OPS = ("training_step", "adapted_model", "fisher_pass")
FROZEN = "frozen base"
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}  # of gradients that went through all blocks
CHECKED = 4  # samples whose gradients are compared with fp64
RATE = 1e-12
LIMIT = 1.05  # x PEFT's model, x a step without EWC
Penalty = Callable[[], Tensor]
Batch = tuple[Tensor, Tensor]  # x, labels


def subject(workload: Workload, samples: int, place: Place) -> Subject:
    """The model of a workload and a batch."""
    model = model_of(workload)
    sizes = (workload.size("blocks"), samples, workload.size("tokens"), workload.size("rank"))
    if isinstance(model, TextModel):
        return models.text(model, *sizes, place.device, workload.torch_dtype)
    label = str(workload.shape["model"])
    make = models.vision
    if label.endswith(OF_TIMM):
        make = models.of_timm
    elif label.endswith(OF_TORCHVISION):
        make = models.of_torchvision
    return make(model, *sizes, place.device, workload.torch_dtype)


def few(base: Subject) -> Batch:
    """The samples whose gradients are compared with fp64."""
    return base.x[:CHECKED], base.labels[:CHECKED]


def gradients(adapted: Adapted, batch: Batch, penalty: Penalty | None = None) -> list[Tensor]:
    """Gradients of the loss with respect to all trained parameters."""
    x, labels = batch
    loss = F.cross_entropy(adapted.model(x), labels)
    if penalty is not None:
        loss = loss + penalty()
    return list(torch.autograd.grad(loss, adapted.leaves()))


def exact(published: Adapted, base: Subject, fishers: list[Tensor] | None = None) -> list[Tensor]:
    """Gradients of the published formulation in fp64, on a few samples."""
    wide, pairs = models.in_fp64(published.model, published.pairs)
    x, labels = few(base)
    penalty = None
    if fishers is not None:
        fishers64 = [f.double() for f in fishers]
        penalty = lambda: eager(fishers64, pairs[0::2], pairs[1::2])  # noqa: E731
    return gradients(Adapted(wide, pairs), (x.double(), labels), penalty)


# Training steps


def optimizer_of(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """SGD or Adam; Adam so that a CUDA graph can capture it."""
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=RATE, foreach=True)
    capturable = parameters[0].device.type == "cuda"
    return torch.optim.Adam(parameters, lr=RATE, capturable=capturable, foreach=True)


def _step(
    workload: Workload, name: str, role: str, adapted: Adapted, base: Subject, penalty: Penalty | None = None,
    entry: Entry | None = None,
) -> Provider:  # fmt: skip
    optimizer_name = str(workload.shape["optimizer"])
    parameters = adapted.leaves()
    optimizer = optimizer_of(optimizer_name, parameters)
    entry = entry or Entry(name, role, None, "")

    def run() -> list[Tensor]:
        with entry.using():
            new_gradients = gradients(adapted, (base.x, base.labels), penalty)
        for parameter, gradient in zip(parameters, new_gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return []

    def check() -> list[Tensor]:
        with entry.using():
            return gradients(adapted, few(base), penalty)

    return Provider(name, run, role, entry.recorded, f"whole step, {optimizer_name}", check=check)


def balanced_fishers(published: Adapted, batch: Batch) -> list[Tensor]:
    """Random Fishers, scaled so that the gradients of the penalty and of the loss have the same norm: the
    check depends on both."""
    fishers = [
        torch.rand(len(b), a.shape[1], device=a.device).square_()
        for a, b in zip(published.lora_as, published.lora_bs, strict=True)
    ]
    of_loss = gradients(published, batch)[: len(published.pairs)]
    penalty = eager(fishers, published.lora_as, published.lora_bs)
    of_penalty = torch.autograd.grad(penalty, published.pairs)
    norms = [torch.cat([t.flatten() for t in group]).norm() for group in (of_loss, of_penalty)]
    return [fisher.mul_(norms[0] / norms[1]) for fisher in fishers]


def _step_targets(workload: Workload, place: Place) -> list[Target]:
    """Targets on a CPU; those on a GPU are in goals.py."""
    if place.gpu or not str(workload.shape["model"]).startswith("ViT-S"):
        return []
    return [Target(registry.WITHOUT, LIMIT, f"at most {LIMIT} x a step without EWC")]


def build_step(workload: Workload, place: Place) -> Case:
    """Ours and the published formulation; the floors are LoRA without a penalty and the head alone, which do
    less than the case."""
    base = subject(workload, workload.size("samples"), place)
    ours = models.adapted(base)
    published = models.explicit(base, ours)
    fishers = balanced_fishers(published, few(base))
    ewc = models.protected(ours.model, fishers)
    entries = place.entries(workload.part)

    def published_penalty() -> Tensor:
        return eager(fishers, published.lora_as, published.lora_bs)

    providers = [_step(workload, e.name, e.role, ours, base, ewc.penalty, e) for e in entries]
    if registry.EXPLICIT in registry.peers(workload):
        providers.append(_step(workload, registry.EXPLICIT, "peer", published, base, published_penalty))
    providers.append(_step(workload, registry.WITHOUT, "floor", ours, base, None, entries[0]))
    if workload.part != SMALL:
        frozen = Adapted(models.sharing(base.model), [])
        providers.append(_step(workload, FROZEN, "floor", frozen, base))
    return Case.of(
        workload,
        providers=providers,
        truth=lambda: exact(published, base, fishers),
        tolerance=TOLERANCES[workload.dtype],
        targets=_step_targets(workload, place),
        product=place.product(workload.torch_dtype),
    )


# Adapted models


def build_adapted(workload: Workload, place: Place) -> Case:
    """Forward and backward of an injected model of timm, and of the same model under PEFT; of torchvision,
    and of the plain model, backward through all of its blocks. PEFT computes something else there: it adds
    the adapter of an attention's out_proj twice."""
    base = subject(workload, workload.size("samples"), place)
    ours = models.adapted(base)
    whole = (base.x, base.labels)
    if str(workload.shape["model"]).endswith(OF_TORCHVISION):
        return _build_attention(workload, place, base, ours)

    def of_peft(batch: Batch) -> Run:
        return lambda: gradients(peft(), batch)

    wrapped: list[Adapted] = []

    def peft() -> Adapted:
        if not wrapped:
            wrapped.append(models.by_peft(base, ours))
        return wrapped[0]

    entry = place.entries(workload.part)[0]
    tiny = not str(workload.shape["model"]).startswith("ViT")
    return Case.of(
        workload,
        providers=[
            Provider(
                OURS, lambda: gradients(ours, whole), "ours", entry.recorded, "forward and backward",
                check=lambda: gradients(ours, few(base)),
            ),
            Provider(registry.PEFT, of_peft(whole), check=of_peft(few(base))),
        ],
        truth=lambda: exact(models.explicit(base, ours), base),
        tolerance=TOLERANCES[workload.dtype],
        targets=[] if tiny else [Target(registry.PEFT, LIMIT, f"at most {LIMIT} x the model under PEFT")],
        product=place.product(workload.torch_dtype),
    )  # fmt: skip


def _build_attention(workload: Workload, place: Place, base: Subject, ours: Adapted) -> Case:
    whole = (base.x, base.labels)
    plain = models.sharing(base.model)
    plain.class_token.requires_grad_(True)  # the input of the first block
    frozen = Adapted(plain, [plain.class_token])
    entry = place.entries(workload.part)[0]
    tiny = not str(workload.shape["model"]).startswith("ViT")
    return Case.of(
        workload,
        providers=[
            Provider(
                OURS, lambda: gradients(ours, whole), "ours", entry.recorded, "forward and backward",
                check=lambda: gradients(ours, few(base)),
            ),
            Provider(FROZEN, lambda: gradients(frozen, whole), "floor"),
        ],
        truth=lambda: _exact_attention(base, ours),
        tolerance=TOLERANCES[workload.dtype],
        targets=[] if tiny else [Target(FROZEN, LIMIT, f"at most {LIMIT} x the plain model")],
        product=place.product(workload.torch_dtype),
    )  # fmt: skip


def _exact_attention(base: Subject, ours: Adapted) -> list[Tensor]:
    """Gradients in fp64 of the plain model with W + B A in place of W, on a few samples."""
    model, pairs = models.in_fp64(models.sharing(base.model), [p.detach() for p in ours.pairs])
    leaves = [pair.double().requires_grad_(True) for pair in pairs]
    weights, factors = dict(model.named_parameters()), iter(leaves)
    for name, layer in adapters(ours.model).items():
        key = layer.weight_name(name)
        rows, done = [], 0
        for piece in layer.adapter_slices:
            ((start, stop),) = piece.rows
            lora_a, lora_b = next(factors), next(factors)
            rows += [weights[key][done:start], weights[key][start:stop] + piece.scaling * (lora_b @ lora_a)]
            done = stop
        weights[key] = torch.cat([*rows, weights[key][done:]])  # type: ignore[assignment]
    x, labels = few(base)
    logits = torch.func.functional_call(model, weights, x.double())
    head = list(models.head_of(model).parameters())
    return list(torch.autograd.grad(F.cross_entropy(logits, labels), [*leaves, *head]))


def build(workload: Workload, place: Place) -> Case:
    """One case; raises `Unavailable` where the library of the model is missing."""
    builders = {
        "training_step": build_step, "adapted_model": build_adapted, "fisher_pass": fisher_pass.build,
    }  # fmt: skip
    return builders[workload.op](workload, place)
