"""The EWC penalty and its gradients, all adapters of a model in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from ..case import OURS, Case, Provider, Run
from ..ewc_penalty import EWC_LAMBDA, eager
from ..shapes import PRECISIONS, Model, Sizes
from .plan import AGAIN, BACKEND, Place, Planned, turns

# Relative gradient errors of 3 x tf32, tf32 and bf16 products are near 1e-7, 2e-4 and 2e-3, with a heavy tail
# in F several times as much.
TOLERANCES = {"highest": 2e-5, "high": 3e-3, "medium": 2e-2}
COMPILED = "torch.compile"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Adapters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]  # F, A, B
Penalty = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


def matrices(model: Model, which: str) -> list[tuple[int, int]]:
    """(d_out, d_in) of every adapted matrix."""
    block = model.linears().values() if which == "all linears" else [(model.width, model.width)] * 2
    return [(d_out, d_in) for d_in, d_out in block] * model.depth


def fused(fishers: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> Tensor:
    """This library."""
    return FE.ewc_penalty(fishers, lora_as, lora_bs, None, EWC_LAMBDA, backend=BACKEND)


def stacked_over(fishers: Sequence[Tensor]) -> Penalty:
    """One batched product per shape, F stored stacked: the best that plain PyTorch offers."""
    shapes = list(dict.fromkeys(f.shape for f in fishers))
    groups = [[i for i, f in enumerate(fishers) if f.shape == shape] for shape in shapes]
    stacks = [torch.stack([fishers[i] for i in group]) for group in groups]

    def penalty(_: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=stacks[0].device)
        for group, stack in zip(groups, stacks, strict=True):
            a, b = (torch.stack([factors[i] for i in group]) for factors in (lora_as, lora_bs))
            total = total + (stack * torch.bmm(b, a).square()).sum()
        return 0.5 * EWC_LAMBDA * total

    return penalty


def with_gradients(penalty: Penalty, inputs: Adapters) -> Run:
    """The penalty and its gradients in all A, then all B."""

    def run() -> list[Tensor]:
        loss = penalty(*inputs)
        return [loss, *torch.autograd.grad(loss, [*inputs[1], *inputs[2]])]

    return run


def exact(inputs: Adapters) -> list[Tensor]:
    """The same in fp64, one matrix at a time."""
    loss, grads_a, grads_b = 0.0, [], []
    for fisher, a, b in zip(*inputs, strict=True):
        wide = [t.detach().double() for t in (fisher, a, b)]
        value, grad_a, grad_b = with_gradients(
            eager, ([wide[0]], [wide[1].requires_grad_()], [wide[2].requires_grad_()])
        )()
        loss = loss + value.detach()
        grads_a.append(grad_a)
        grads_b.append(grad_b)
    return [torch.as_tensor(loss), *grads_a, *grads_b]


def draw(sizes: list[tuple[int, int]], rank: int, dtype: torch.dtype, place: Place) -> Adapters:
    def random(method: Callable[..., Tensor], *size: int) -> Tensor:
        return method(*size, device=place.device)

    fishers = [random(torch.rand, *size).square_().to(dtype) for size in sizes]
    lora_as = [random(torch.randn, rank, d_in).div_(d_in**0.5).requires_grad_() for _, d_in in sizes]
    lora_bs = [random(torch.randn, d_out, rank).mul_(1e-2).requires_grad_() for d_out, _ in sizes]
    return fishers, lora_as, lora_bs


def build(planned: Planned, place: Place, sizes: list[tuple[int, int]], later: bool) -> Case:
    """One case, or its later part: the compiled peer."""
    rank, precision = int(planned.shape["rank"]), str(planned.shape["precision"])
    dtype = DTYPES[planned.dtype.removeprefix("fisher ")]
    parameters = sum(d_out * d_in for d_out, d_in in sizes)
    fisher_bytes = float(parameters * dtype.itemsize)
    factor_bytes = 4.0 * rank * sum(d_out + d_in for d_out, d_in in sizes)
    buffers = [draw(sizes, rank, dtype, place) for _ in range(place.copies(fisher_bytes))]

    def provider(name: str, penalty: Penalty, role: str = "peer", backend: str = "") -> Provider:
        runs = turns(lambda one: with_gradients(penalty, one), buffers)
        return Provider(name, role=role, backend=backend, algorithm="one launch" if backend else "", **runs)

    if later:
        compiled = provider(COMPILED, place.compiled(eager))
        providers = [provider(AGAIN, fused, "variant", BACKEND), compiled]
    else:
        stacks = turns(lambda one: with_gradients(stacked_over(one[0]), one), buffers)
        providers = [
            provider(OURS, fused, "ours", BACKEND),
            Provider("stacked bmm", **stacks),
            provider("eager autograd", eager),
        ]
    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype,
        flops=6.0 * rank * parameters, bytes=fisher_bytes + 2 * factor_bytes,
        providers=providers, truth=lambda: exact(buffers[0]), tolerance=TOLERANCES[precision],
        product="tf32", precision=precision, floor_bytes=None if later else fisher_bytes,
    )  # fmt: skip


def _planned(model: Model, which: str, rank: int, dtype: str, precision: str, later: bool = False) -> Planned:
    sizes = matrices(model, which)
    shape: dict[str, int | str] = {
        "model": model.name, "linears": which, "matrices": len(sizes), "rank": rank, "precision": precision,
    }  # fmt: skip
    made = functools.partial(build, sizes=sizes, later=later)
    return Planned("ewc_penalty", shape, f"fisher {dtype}", made, COMPILED if later else OURS)


def plan(sizes: Sizes) -> Iterator[Planned]:
    """The published setting first: k and v of the large model, F in fp32, at every precision."""

    def all_of(which: str, rank: int, dtype: str, models: Sequence[Model]) -> Iterator[Planned]:
        for precision in PRECISIONS:
            for model in models:
                yield _planned(model, which, rank, dtype, precision)

    single, half = DTYPES
    yield from all_of("k, v", sizes.slice_rank, single, sizes.models)
    for precision in ("highest", "high"):
        yield _planned(sizes.large, "k, v", sizes.slice_rank, single, precision, later=True)
    yield from all_of("k, v", sizes.slice_rank, half, sizes.models)
    for rank in (sizes.slice_rank, sizes.rank):
        for dtype in DTYPES:
            yield from all_of("all linears", rank, dtype, [sizes.large])
    for dtype in DTYPES:
        yield from all_of("k, v", sizes.rank, dtype, sizes.models)
