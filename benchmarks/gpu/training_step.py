"""One training step of a ViT with adapters on k and v: forward, backward, penalty, optimizer.

Records hold it replayed from a CUDA graph (`seconds`, which also shows that the whole step can be captured)
and run eagerly (`host_seconds`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ewclora import functional as FE

from ..case import OURS, Case, Provider
from ..ewc_penalty import EWC_LAMBDA, eager
from ..shapes import Model, Sizes
from .plan import BACKEND, CUDA, Place, Planned, cuda_is_built
from .vit import CLASSES, Projection, Stack, random_stack

CHECKED = 4  # samples whose gradients are compared with fp64
TOLERANCE = 0.1  # of gradients that went through all blocks in bf16
WITHOUT, EXPLICIT, FLOOR = "LoRA without EWC", "explicit deltaW, eager penalty", "frozen base"
OPTIMIZERS = ("SGD", "Adam")
Penalty = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]
Data = tuple[Tensor, Tensor]  # x, labels


def plain(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    """No adapters."""
    return F.linear(x, weight, bias)


def fused(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor, backend: str = BACKEND) -> Tensor:
    """This library."""
    d = weight.shape[0] // 3
    a_k, b_k, a_v, b_v = adapters
    slices = [(d, 2 * d, a_k, b_k, 1.0), (2 * d, 3 * d, a_v, b_v, 1.0)]
    return FE.lora_linear_slices(x, weight, bias, slices, backend=backend)


def explicit(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """As published: deltaW = B A as a matrix, and products of x with it."""
    a_k, b_k, a_v, b_v = adapters
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    k = k + F.linear(x, (b_k @ a_k).to(x.dtype))
    v = v + F.linear(x, (b_v @ a_v).to(x.dtype))
    return torch.cat([q, k, v], dim=-1)


def composed(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """Low-rank products beside the frozen one, as PEFT computes."""
    a_k, b_k, a_v, b_v = (t.to(x.dtype) for t in adapters)
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    k, v = k + F.linear(F.linear(x, a_k), b_k), v + F.linear(F.linear(x, a_v), b_v)
    return torch.cat([q, k, v], dim=-1)


def fused_penalty(
    fishers: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor], backend: str = BACKEND
) -> Tensor:
    return FE.ewc_penalty(fishers, lora_as, lora_bs, None, EWC_LAMBDA, backend=backend)


def gradients(
    stack: Stack,
    data: Data,
    project: Projection,
    penalty: Penalty | None,
    fishers: list[Tensor],
) -> list[Tensor]:
    """Of the loss in all parameters. x requires a gradient, so that every block passes one on."""
    x, labels = data
    loss = stack.loss(x, labels, project)
    if penalty is not None:
        loss = loss + penalty(fishers, *stack.factors())
    parameters = stack.parameters(project is not plain)
    return list(torch.autograd.grad(loss, [x, *parameters]))[1:]


def provider(
    name: str, role: str, start: Stack, fishers: list[Tensor], data: Data,
    project: Projection, penalty: Penalty | None, optimizer: str,
) -> Provider:  # fmt: skip
    stack = start.copy(torch.bfloat16, torch.float32)
    parameters = stack.parameters(project is not plain)
    on_gpu = data[0].device.type == "cuda"
    if optimizer == "Adam":
        step = torch.optim.Adam(parameters, lr=1e-6, capturable=on_gpu, foreach=True)
    else:
        step = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, foreach=True)

    def run() -> list[Tensor]:
        for parameter, grad in zip(
            parameters, gradients(stack, data, project, penalty, fishers), strict=True
        ):
            parameter.grad = grad
        step.step()
        return []

    few = (data[0][:CHECKED].detach().requires_grad_(), data[1][:CHECKED])

    def check() -> list[Tensor]:
        return gradients(start, few, project, penalty, fishers)

    backend = {OURS: BACKEND, WITHOUT: BACKEND, CUDA: "cuda"}.get(name, "")
    return Provider(name, run, role, backend, f"whole step, {optimizer}", check=check)


def build(planned: Planned, place: Place, model: Model) -> Case:
    samples, rank = int(planned.shape["samples"]), int(planned.shape["rank"])
    optimizer = str(planned.shape["optimizer"])
    start = random_stack(model, rank, place.device)
    x = torch.randn(samples, model.tokens, model.width, device=place.device).bfloat16().requires_grad_()
    data = (x, torch.randint(0, CLASSES, (samples,), device=place.device))
    # The size of a gradient of the penalty should be that of one of the loss, so that the check sees both.
    fishers = [
        torch.rand(model.width, model.width, device=place.device).square_() * 1e-2
        for _ in range(2 * model.depth)
    ]

    def variant(name: str, role: str, project: Projection, penalty: Penalty | None) -> Provider:
        return provider(name, role, start, fishers, data, project, penalty, optimizer)

    def truth() -> list[Tensor]:
        wide = start.copy(torch.float64, torch.float64)
        few = (x[:CHECKED].detach().double().requires_grad_(), data[1][:CHECKED])
        return gradients(wide, few, composed, eager, [f.double() for f in fishers])

    of_cuda = (functools.partial(fused, backend="cuda"), functools.partial(fused_penalty, backend="cuda"))
    tokens, parameters = samples * model.tokens, sum(i * o for i, o in model.linears().values())
    attention = 4.0 * samples * model.tokens**2 * model.width
    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype,
        flops=model.depth * (4.0 * tokens * parameters + 3.5 * attention),
        bytes=4.0 * sum(f.numel() for f in fishers) + 4.0 * model.depth * parameters,
        # Floors are not checked: what is compared with fp64 has the penalty in it.
        providers=[
            variant(OURS, "ours", fused, fused_penalty),
            *([variant(CUDA, "variant", *of_cuda)] if cuda_is_built() else []),
            variant(WITHOUT, "floor", fused, None),
            variant(EXPLICIT, "peer", explicit, eager),
            variant("composition (PEFT's), eager penalty", "peer", composed, eager),
            variant(FLOOR, "floor", plain, None),
        ],
        truth=truth, tolerance=TOLERANCE, product="bf16",
    )  # fmt: skip


def plan(sizes: Sizes) -> Iterator[Planned]:
    """The large model at full depth."""
    for optimizer in OPTIMIZERS:
        model = sizes.large
        shape: dict[str, int | str] = {
            "model": model.name, "depth": model.depth, "samples": sizes.samples, "tokens": model.tokens,
            "rank": sizes.slice_rank, "optimizer": optimizer,
        }  # fmt: skip
        yield Planned("training_step", shape, "bfloat16", functools.partial(build, model=model))
