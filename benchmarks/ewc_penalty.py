"""The EWC penalty and its gradients, all adapters in one call, against how PyTorch users write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from . import extras, registry
from .case import OURS, Case, Provider, Run, Target
from .registry import Workload

OPS = ("ewc_penalty",)
EWC_LAMBDA = 3.0
Tensors = Sequence[Tensor]


def eager(fishers: Tensors, lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """As published: explicit B A per matrix, squared, weighted and summed."""
    total = torch.zeros((), device=fishers[0].device)
    for fisher, a, b in zip(fishers, lora_as, lora_bs, strict=True):
        total = total + (fisher * (b @ a).pow(2)).sum()
    return 0.5 * EWC_LAMBDA * total


def stacked(fishers: Tensors, lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """One batched product over matrices of equal shape."""
    delta = torch.bmm(torch.stack(list(lora_bs)), torch.stack(list(lora_as)))
    return 0.5 * EWC_LAMBDA * (torch.stack(list(fishers)) * delta.pow(2)).sum()


def fused(fishers: Tensors, lora_as: Tensors, lora_bs: Tensors) -> Tensor:
    """This library."""
    return FE.ewc_penalty(fishers, lora_as, lora_bs, None, EWC_LAMBDA)


def with_gradients(
    penalty: Callable[[Tensors, Tensors, Tensors], Tensor],
    fishers: Tensors,
    lora_as: Tensors,
    lora_bs: Tensors,
) -> Run:
    """The penalty and its gradients in all A and all B."""

    def run() -> list[Tensor]:
        loss = penalty(fishers, lora_as, lora_bs)
        return [loss, *torch.autograd.grad(loss, [*lora_as, *lora_bs])]

    return run


def _targets(one: Workload) -> list[Target]:
    published = one.shape["rank"] == 10 and one.size("adapters") == 12 and one.dtype == "fisher float32"
    if not published:
        return []
    return [
        Target("eager autograd", 1 / 4, "at least 4 x faster than eager"),
        Target(registry.COMPILED, 1 / 2.2, "at least 2.2 x faster than torch.compile"),
    ]


def build(one: Workload) -> Case:
    """One case: ours, the peers, and a product of as many FLOPs."""
    d_out, d_in, count, rank = (one.size(name) for name in ("d_out", "d_in", "adapters", "rank"))
    fishers = [torch.rand(d_out, d_in).square_().to(one.torch_dtype) for _ in range(count)]
    lora_as = [torch.randn(rank, d_in).div_(d_in**0.5).requires_grad_() for _ in range(count)]
    lora_bs = [torch.randn(d_out, rank).mul_(1e-2).requires_grad_() for _ in range(count)]
    inputs = (fishers, lora_as, lora_bs)

    def truth() -> Tensors:
        wide = [[t.detach().double() for t in group] for group in inputs]
        for t in [*wide[1], *wide[2]]:
            t.requires_grad_()
        return with_gradients(eager, wide[0], wide[1], wide[2])()

    inner = max(1, round(one.work.flops / (2.0 * d_out * d_in)))
    left, right = torch.randn(d_out, inner), torch.randn(inner, d_in)
    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            Provider(OURS, with_gradients(fused, *inputs), "ours", "cpu", "C++ one pass over F"),
            Provider("eager autograd", with_gradients(eager, *inputs)),
            Provider(registry.COMPILED, with_gradients(extras.compiled(eager), *inputs)),
            Provider("stacked bmm", with_gradients(stacked, *inputs)),
            Provider("sgemm of equal FLOPs", lambda: [left @ right], role="floor"),
        ],
        truth=truth,
        tolerance=2e-5,
        targets=_targets(one),
    )
