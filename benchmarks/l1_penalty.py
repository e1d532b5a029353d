# SPDX-License-Identifier: Apache-2.0
"""The l1 norm of B A and its gradients, all adapters in one call, compared with formulations in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from . import ewc_penalty, registry
from .case import Case, Provider, Run
from .place import Place, turns
from .workload import Workload, matrices

OPS = ("l1_penalty",)
L1_LAMBDA = 0.4  # N-LoRA, arXiv 2410.10179
LOST = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # of a factor, at most, by precision
Tensors = Sequence[Tensor]
Penalty = Callable[[Tensors, Tensors], Tensor]


def of_signs(lost: float) -> float:
    """What signs add to the relative error of a gradient, a sum of factors times the signs of D = B A: where
    factors lose a part of themselves, at most about as large a share of the elements of D is so near to 0
    that it changes its sign. Each then is wrong by 2, so that the norm is by twice the root of the share."""
    return 2 * lost**0.5


TOLERANCES = {name: ewc_penalty.TOLERANCES[name] + of_signs(lost) for name, lost in LOST.items()}


class Inputs(NamedTuple):
    """Inputs of one case, one entry per matrix."""

    lora_as: list[Tensor]
    lora_bs: list[Tensor]


def eager(lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """Explicit B A per matrix."""
    total = torch.zeros((), device=lora_as[0].device)
    for a, b in zip(lora_as, lora_bs, strict=True):
        total = total + (b @ a).abs().sum()
    return L1_LAMBDA * total


def stacked(lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """One batched product; all matrices of a case have one shape."""
    return L1_LAMBDA * torch.bmm(torch.stack([*lora_bs]), torch.stack([*lora_as])).abs().sum()


def with_gradients(penalty: Penalty, inputs: Inputs) -> Run:
    """The penalty and its gradients in all A and all B."""

    def run() -> list[Tensor]:
        loss = penalty(*inputs)
        return [loss, *torch.autograd.grad(loss, [*inputs.lora_as, *inputs.lora_bs])]

    return run


def exact(inputs: Inputs) -> list[Tensor]:
    """The same in fp64, one matrix at a time."""
    loss, grads_a, grads_b = 0.0, [], []
    for pair in zip(*inputs, strict=True):
        a, b = (t.detach().double().requires_grad_() for t in pair)
        value, grad_a, grad_b = with_gradients(eager, Inputs([a], [b]))()
        loss = loss + value.detach()
        grads_a.append(grad_a)
        grads_b.append(grad_b)
    return [torch.as_tensor(loss), *grads_a, *grads_b]


def draw(workload: Workload, place: Place) -> Inputs:
    """Random inputs of the usual sizes."""
    rank, sizes, options = workload.size("rank"), matrices(workload), {"device": place.device}
    return Inputs(
        [torch.randn(rank, d_in, **options).div_(d_in**0.5).requires_grad_() for _, d_in in sizes],
        [torch.randn(d_out, rank, **options).mul_(1e-2).requires_grad_() for d_out, _ in sizes],
    )


def _providers(workload: Workload, place: Place, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    for entry in place.entries(workload.part):
        call = entry.of(FE.l1_penalty)

        def ours(lora_as: Tensors, lora_bs: Tensors, call: Callable[..., Tensor] = call) -> Tensor:
            return call(lora_as, lora_bs, None, L1_LAMBDA)

        runs = turns(functools.partial(with_gradients, ours), buffers)
        yield Provider(
            entry.name, role=entry.role, backend=entry.recorded, algorithm=entry.described("B A in tiles"),
            **runs,
        )  # fmt: skip
    methods = {registry.EAGER: eager, registry.STACKED: stacked}
    for name in registry.peers(workload):
        method = place.compiled(eager) if name == registry.COMPILED else methods[name]
        yield Provider(name, **turns(functools.partial(with_gradients, method), buffers))
    yield from ewc_penalty.floors(workload, place)


def build(workload: Workload, place: Place) -> Case:
    """One case: ours, the peers, and on a CPU a product of as many FLOPs as floor."""
    buffers = [draw(workload, place) for _ in range(place.copies(workload.work.bytes))]
    return Case.of(
        workload,
        providers=list(_providers(workload, place, buffers)),
        truth=lambda: exact(buffers[0]),
        tolerance=TOLERANCES[workload.precision or "highest"],
        product=place.single,
        precision=workload.precision,
    )
