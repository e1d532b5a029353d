"""The EWC penalty and its gradients, all adapters in one call, against how PyTorch users write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from .case import OURS, Case, Provider, Target

EWC_LAMBDA = 3.0
SHAPES = (  # model, width, adapters, rank, Fisher dtype
    ("ViT-B k,v", 768, 12, 10, torch.float32),
    ("ViT-L k,v", 1024, 12, 10, torch.float32),
    ("ViT-L k,v", 1024, 12, 4, torch.float32),
    ("ViT-L k,v", 1024, 12, 30, torch.float32),
    ("ViT-L k,v", 1024, 12, 64, torch.float32),
    ("ViT-L k,v", 1024, 12, 10, torch.bfloat16),
)
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


def cases() -> Iterator[Case]:
    """ViT-B and ViT-L k,v at the published rank 10, and ViT-L at other ranks and with a bf16 Fisher."""
    for model, d, count, rank, dtype in SHAPES:
        fishers = [torch.rand(d, d).pow(2).to(dtype) for _ in range(count)]
        lora_as = [torch.randn(rank, d).div_(d**0.5).requires_grad_() for _ in range(count)]
        lora_bs = [torch.randn(d, rank).mul_(1e-2).requires_grad_() for _ in range(count)]

        def with_gradients(
            penalty: Callable[[Tensors, Tensors, Tensors], Tensor],
            inputs: tuple[Tensors, Tensors, Tensors] = (fishers, lora_as, lora_bs),
        ) -> Callable[[], list[Tensor]]:
            def run() -> list[Tensor]:
                loss = penalty(*inputs)
                return [loss, *torch.autograd.grad(loss, [*inputs[1], *inputs[2]])]

            return run

        def truth(inputs: tuple[Tensors, Tensors, Tensors] = (fishers, lora_as, lora_bs)) -> list[Tensor]:
            wide = [[t.detach().double() for t in group] for group in inputs]
            for t in [*wide[1], *wide[2]]:
                t.requires_grad_()
            return with_gradients(eager, (wide[0], wide[1], wide[2]))()

        flops = 6.0 * rank * d * d * count
        inner = round(flops / (2.0 * d * d))
        left, right = torch.randn(d, inner), torch.randn(inner, d)
        published = rank == 10 and dtype == torch.float32
        yield Case(
            op="ewc_penalty",
            shape={"model": model, "d_out": d, "d_in": d, "adapters": count, "rank": rank},
            dtype=f"fisher {str(dtype).removeprefix('torch.')}",
            flops=flops,
            bytes=float(fishers[0].element_size() * d * d * count),
            providers=[
                Provider(
                    OURS, with_gradients(fused), role="ours", backend="cpu", algorithm="C++ one pass over F"
                ),
                Provider("eager autograd", with_gradients(eager)),
                Provider("torch.compile", with_gradients(torch.compile(eager))),
                Provider("stacked bmm", with_gradients(stacked)),
                Provider("sgemm of equal FLOPs", lambda a=left, b=right: [a @ b], role="floor"),  # type: ignore[misc]
            ],
            truth=truth,
            tolerance=2e-5,
            targets=[
                Target("eager autograd", 1 / 4, "at least 4 x faster than eager"),
                Target("torch.compile", 1 / 2.2, "at least 2.2 x faster than torch.compile"),
            ]
            if published
            else [],
        )
