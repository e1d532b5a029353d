# SPDX-License-Identifier: Apache-2.0
"""The EWC penalty and its gradients, all adapters in one call, compared with formulations in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.ops import schemas

from . import registry
from .case import Case, Provider, Run, Target
from .place import Entry, Place, turns
from .workload import MAIN, OP, Workload, matrices

OPS = ("ewc_penalty",)
EWC_LAMBDA = 3.0
# Relative gradient errors of 3 x tf32, tf32 and bf16 products are near 1e-7, 2e-4 and 2e-3, and
# several times larger where F has a heavy tail.
TOLERANCES = {"highest": 2e-5, "high": 3e-3, "medium": 2e-2}
Tensors = Sequence[Tensor]
Penalty = Callable[[Tensors, Tensors, Tensors], Tensor]


class Inputs(NamedTuple):
    """Inputs of one case, one entry per matrix."""

    fishers: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]


def eager(fishers: Tensors, lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """As published: explicit B A per matrix, squared, weighted and summed."""
    total = torch.zeros((), device=fishers[0].device)
    for fisher, a, b in zip(fishers, lora_as, lora_bs, strict=True):
        total = total + (fisher * (b @ a).pow(2)).sum()
    return 0.5 * EWC_LAMBDA * total


def stacked_over(fishers: Tensors) -> Penalty:
    """One batched product per shape with F stored stacked: the fastest formulation in plain PyTorch."""
    shapes = list(dict.fromkeys(f.shape for f in fishers))
    groups = [[i for i, f in enumerate(fishers) if f.shape == shape] for shape in shapes]
    stacks = [torch.stack([fishers[i] for i in group]) for group in groups]

    def penalty(_: Tensors, lora_as: Tensors, lora_bs: Tensors) -> Tensor:
        total = torch.zeros((), device=stacks[0].device)
        for group, stack in zip(groups, stacks, strict=True):
            a, b = (torch.stack([factors[i] for i in group]) for factors in (lora_as, lora_bs))
            total = total + (stack * torch.bmm(b, a).square()).sum()
        return 0.5 * EWC_LAMBDA * total

    return penalty


def fused(
    fishers: Tensors, lora_as: Tensors, lora_bs: Tensors, call: Callable[..., Tensor] = FE.ewc_penalty
) -> Tensor:
    """This library, or another function with the signature of the op."""
    return call(fishers, lora_as, lora_bs, None, EWC_LAMBDA)


def with_gradients(penalty: Penalty, inputs: Inputs) -> Run:
    """The penalty and its gradients in all A and all B."""

    def run() -> list[Tensor]:
        loss = penalty(*inputs)
        return [loss, *torch.autograd.grad(loss, [*inputs.lora_as, *inputs.lora_bs])]

    return run


def of_op_layer(inputs: Inputs, backend: str) -> Run:
    """One call of the op, without argument checks and autograd: the loss and all gradients in one tensor."""
    none, ones = [None] * len(inputs.fishers), [1.0] * len(inputs.fishers)
    needs = [True, True, False]

    def run() -> list[Tensor]:
        with torch.no_grad():
            return list(schemas.ewc_penalty(*inputs, none, ones, EWC_LAMBDA, needs, backend))

    return run


def flat(results: Tensors) -> list[Tensor]:
    """The loss, and every dA and every dB in one tensor, as the op returns them."""
    loss, *grads = results
    return [loss, torch.cat([grad.flatten() for grad in grads])]


def exact(inputs: Inputs) -> list[Tensor]:
    """The same in fp64, one matrix at a time."""
    loss, grads_a, grads_b = 0.0, [], []
    for fisher, a, b in zip(*inputs, strict=True):
        wide = [t.detach().double() for t in (fisher, a, b)]
        single = Inputs([wide[0]], [wide[1].requires_grad_()], [wide[2].requires_grad_()])
        value, grad_a, grad_b = with_gradients(eager, single)()
        loss = loss + value.detach()
        grads_a.append(grad_a)
        grads_b.append(grad_b)
    return [torch.as_tensor(loss), *grads_a, *grads_b]


def draw(workload: Workload, place: Place) -> Inputs:
    """Random inputs of the usual sizes."""
    rank, sizes = workload.size("rank"), matrices(workload)

    def random(method: Callable[..., Tensor], *size: int) -> Tensor:
        return method(*size, device=place.device)

    return Inputs(
        [random(torch.rand, *size).square_().to(workload.torch_dtype) for size in sizes],
        [random(torch.randn, rank, d_in).div_(d_in**0.5).requires_grad_() for _, d_in in sizes],
        [random(torch.randn, d_out, rank).mul_(1e-2).requires_grad_() for d_out, _ in sizes],
    )


def _ours(workload: Workload, entry: Entry, buffers: Sequence[Inputs]) -> Provider:
    if workload.part == OP:
        run, algorithm = of_op_layer(buffers[0], entry.recorded), "the op alone"
        return Provider(entry.name, run, entry.role, entry.recorded, algorithm)
    method = functools.partial(fused, call=entry.of(FE.ewc_penalty))
    runs = turns(lambda inputs: with_gradients(method, inputs), buffers)
    algorithm = entry.described("one pass over F")
    return Provider(entry.name, role=entry.role, backend=entry.recorded, algorithm=algorithm, **runs)


def _peers(workload: Workload, place: Place, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    for name in registry.peers(workload):
        method = place.compiled(eager) if name == registry.COMPILED else eager

        def make(inputs: Inputs, name: str = name, method: Penalty = method) -> Run:
            return with_gradients(stacked_over(inputs[0]) if name == registry.STACKED else method, inputs)

        yield Provider(name, **turns(make, buffers))


def floors(workload: Workload, place: Place) -> Iterator[Provider]:
    """On a CPU, a product with as many FLOPs; on a GPU, the floor is computed from the bytes of F."""
    if not place.gpu:
        d_out, d_in = workload.size("d_out"), workload.size("d_in")
        inner = max(1, round(workload.work.flops / (2.0 * d_out * d_in)))
        left, right = torch.randn(d_out, inner), torch.randn(inner, d_in)
        yield Provider("sgemm of equal FLOPs", lambda: [left @ right], role="floor")


def _targets(workload: Workload, place: Place) -> list[Target]:
    """Targets on a CPU; those on a GPU are in goals.py."""
    published = (
        workload.shape["rank"] == 10
        and workload.size("adapters") == 12
        and workload.dtype == "fisher float32"
    )
    if place.gpu or not published:
        return []
    return [
        Target("eager autograd", 1 / 4, "at least 4 x faster than eager"),
        Target(registry.COMPILED, 1 / 2.2, "at least 2.2 x faster than torch.compile"),
    ]


def build(workload: Workload, place: Place) -> Case:
    """One case or part: ours, the peers, and a floor."""
    of_fisher = float(workload.torch_dtype.itemsize * sum(d_out * d_in for d_out, d_in in matrices(workload)))
    buffers = [draw(workload, place) for _ in range(1 if workload.part == OP else place.copies(of_fisher))]

    def truth() -> list[Tensor]:
        results = exact(buffers[0])
        return flat(results) if workload.part == OP else results

    return Case.of(
        workload,
        providers=[
            *(_ours(workload, entry, buffers) for entry in place.entries(workload.part)),
            *_peers(workload, place, buffers),
            *floors(workload, place),
        ],
        truth=truth,
        tolerance=TOLERANCES[workload.precision or "highest"],
        targets=_targets(workload, place),
        product=place.single,
        precision=workload.precision,
        floor_bytes=of_fisher if workload.part == MAIN else None,
    )
