# SPDX-License-Identifier: Apache-2.0
"""Penalties and sums of structured Fishers, beside the same work on a dense F in one case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.fishers import EightBitFisher, FactoredFisher, Fisher, KroneckerFisher
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.dispatch import Call

from . import ewc_penalty, fisher_accumulate, registry
from .case import OURS, Case, Provider, Run
from .ewc_penalty import EWC_LAMBDA
from .place import Entry, Place, turns
from .workload import EIGHT_BIT, FACTORED, Workload

OPS = ("structured_penalty", "fisher_sums")
TOLERANCE = 2e-5  # of sums of products in fp32
Penalty = Callable[["Inputs"], Tensor]


class Inputs(NamedTuple):
    """Inputs of one case, one entry per matrix."""

    fishers: list[Fisher]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]


def structured(dense: Tensor, kind: str) -> Fisher:
    """A Fisher of this kind, made of a dense one; the factors of a Kronecker one need only its shape."""
    if kind == EIGHT_BIT:
        return EightBitFisher.encode(dense)
    if kind == FACTORED:
        return FactoredFisher(dense.sum(1), dense.sum(0))
    factors = [torch.randn(size, size, device=dense.device) for size in dense.shape]
    return KroneckerFisher(*(factor @ factor.T / len(factor) for factor in factors))


def products(fisher: Fisher, a: Tensor, b: Tensor) -> Tensor:
    """sum F (B A)^2, or its Kronecker form, of one matrix, in few operations of PyTorch."""
    if isinstance(fisher, FactoredFisher):
        rows, columns = (sums.to(a.dtype) for sums in fisher)
        return ((b.T * rows @ b) * (a * columns @ a.T)).sum() / columns.sum()
    if isinstance(fisher, KroneckerFisher):
        outputs, inputs = (factor.to(a.dtype) for factor in fisher)
        return ((b.T @ outputs @ b) * (a @ inputs @ a.T)).sum()
    assert isinstance(fisher, EightBitFisher)
    return (fisher.dense().to(a.dtype) * (b @ a).square()).sum()


def eager(inputs: Inputs) -> Tensor:
    """Formulas in PyTorch; 8-bit Fishers are decoded first."""
    total = torch.zeros((), device=inputs.lora_as[0].device)
    for entry in zip(*inputs, strict=True):
        total = total + products(*entry)
    return 0.5 * EWC_LAMBDA * total


def with_gradients(penalty: Penalty, inputs: Inputs) -> Run:
    """The penalty and its gradients in all A and all B."""

    def run() -> list[Tensor]:
        loss = penalty(inputs)
        return [loss, *torch.autograd.grad(loss, [*inputs.lora_as, *inputs.lora_bs])]

    return run


def exact(inputs: Inputs) -> list[Tensor]:
    """The same in fp64, one matrix at a time."""
    loss, grads_a, grads_b = 0.0, [], []
    for fisher, a, b in zip(*inputs, strict=True):
        wide = [factor.detach().double().requires_grad_() for factor in (a, b)]
        value = 0.5 * EWC_LAMBDA * products(fisher, *wide)
        grad_a, grad_b = torch.autograd.grad(value, wide)
        loss = loss + value.detach()
        grads_a.append(grad_a)
        grads_b.append(grad_b)
    return [torch.as_tensor(loss), *grads_a, *grads_b]


def serving(op: str, workload: Workload, place: Place) -> list[Entry]:
    """Our backends that have an implementation of the op of this name, the first as ours; on a CPU the one
    that is chosen, on a GPU without any the reference."""
    entries = place.entries(workload.part)
    if not place.gpu:
        call = Call("cpu", torch.float32)
        chosen = dispatch.choose(op, "auto", call).backend
        return [entry if entry.function else entry._replace(recorded=chosen) for entry in entries]
    serve = {candidate.backend for candidate in dispatch.candidates(op)}
    first, *others = [entry for entry in entries if entry.recorded in serve] or [
        Entry(OURS, "ours", "reference", "reference")
    ]
    own = [entry for entry in entries if entry.function]
    return [first._replace(name=OURS, role="ours"), *others, *own]


def _op_of(workload: Workload) -> str:
    """The op that a call on this kind of Fisher runs."""
    kind = str(workload.shape["fisher"])
    return "ewc_penalty" if kind == EIGHT_BIT else f"{kind}_penalty"


def _penalty_of(entry: Entry) -> Penalty:
    call = entry.of(FE.ewc_penalty)
    return lambda inputs: call(*inputs, None, EWC_LAMBDA)


def _penalties(workload: Workload, place: Place) -> Case:
    kind = str(workload.shape["fisher"])
    copies = place.copies(workload.work.bytes)
    dense = [ewc_penalty.draw(workload, place) for _ in range(copies)]
    buffers = [
        Inputs([structured(fisher, kind) for fisher in one.fishers], one.lora_as, one.lora_bs)
        for one in dense
    ]
    providers = []
    for entry in serving(_op_of(workload), workload, place):
        make = functools.partial(with_gradients, _penalty_of(entry))
        providers.append(
            Provider(entry.name, role=entry.role, backend=entry.recorded,
                     algorithm=entry.described(f"{kind} F"),
                     **turns(make, buffers))
        )  # fmt: skip
        if entry.role == "ours":
            of_dense = [Inputs(list(one.fishers), one.lora_as, one.lora_bs) for one in dense]
            providers.append(Provider(registry.DENSE, role="floor", **turns(make, of_dense)))
    for name in registry.peers(workload):
        method = place.compiled(eager) if name == registry.COMPILED else eager
        providers.append(Provider(name, **turns(functools.partial(with_gradients, method), buffers)))
    return Case.of(
        workload,
        providers=providers,
        truth=lambda: exact(buffers[0]),
        tolerance=TOLERANCE,
        product=place.single,
    )


def sums_of(method: fisher_accumulate.Method) -> Callable[[FactoredFisher, Tensor, Tensor], Any]:
    """The row and column sums of what a method makes of a dense F."""

    def add(fisher: FactoredFisher, x: Tensor, dy: Tensor) -> FactoredFisher:
        dense = method(x.new_zeros(len(fisher.rows), len(fisher.columns)), x, dy)
        return FactoredFisher(fisher.rows.add_(dense.sum(1)), fisher.columns.add_(dense.sum(0)))

    return add


def _sums_like(fisher: Tensor, dtype: torch.dtype = torch.float32) -> FactoredFisher:
    return FactoredFisher(*(fisher.new_zeros(size, dtype=dtype) for size in fisher.shape))


def _sums(workload: Workload, place: Place) -> Case:
    buffers = [fisher_accumulate.draw(workload, place) for _ in range(place.copies(workload.work.bytes))]
    zeros, x, dy = buffers[0]

    def provider(name: str, method: Callable[..., Any], role: str = "peer", backend: str = "") -> Provider:
        """Timed while adding to sums, as in training; checked on zeros."""
        makes = [(_sums_like(fisher), x, dy) for fisher, x, dy in buffers]
        return Provider(
            name, role=role, backend=backend, algorithm="row and column sums" if backend else "",
            check=lambda: list(method(_sums_like(zeros), x, dy)),
            **turns(lambda one: lambda: list(method(*one)), makes),
        )  # fmt: skip

    providers = []
    for entry in serving("fisher_sums_", workload, place):
        method = entry.of(fisher_accumulate.OURS)
        providers.append(provider(entry.name, method, entry.role, entry.recorded))
        if entry.role == "ours":
            dense = turns(lambda one, m=method: lambda: [m(*one)], buffers)
            providers.append(Provider(registry.DENSE, role="floor", **dense))
    for name in registry.peers(workload):
        providers.append(provider(name, sums_of(fisher_accumulate.METHODS[name])))

    def truth() -> Sequence[Tensor]:
        add = sums_of(fisher_accumulate.one_by_one)
        return list(add(_sums_like(zeros, torch.float64), x.double(), dy.double()))

    return Case.of(
        workload,
        providers=providers,
        truth=truth,
        tolerance=fisher_accumulate.TOLERANCES[workload.dtype],
        product=place.product(workload.torch_dtype),
    )


def build(workload: Workload, place: Place) -> Case:
    """One case: ours, ours with a dense F as its floor, and formulas in PyTorch."""
    return (_sums if workload.op == "fisher_sums" else _penalties)(workload, place)
