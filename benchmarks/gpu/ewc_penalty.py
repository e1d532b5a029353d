"""The EWC penalty and its gradients, all adapters of a model in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.ops import _library

from ..case import OURS, Case, Provider, Run
from ..ewc_penalty import EWC_LAMBDA, eager
from ..shapes import PRECISIONS, Model, Sizes
from .plan import AGAIN, BACKEND, CUDA, LATER, MAIN, SMALL, Place, Planned, cuda_is_built, turns

# Relative gradient errors of 3 x tf32, tf32 and bf16 products are near 1e-7, 2e-4 and 2e-3, with a heavy tail
# in F several times as much.
TOLERANCES = {"highest": 2e-5, "high": 3e-3, "medium": 2e-2}
COMPILED = "torch.compile"
OP_LAYER = "op layer"  # the model of the case that shows the host's time of one call of the op
OP_WIDTH = 64  # of its matrices: the device is done before the host
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Adapters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]  # F, A, B
Penalty = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


def matrices(model: Model, which: str) -> list[tuple[int, int]]:
    """(d_out, d_in) of every adapted matrix."""
    block = model.linears().values() if which == "all linears" else [(model.width, model.width)] * 2
    return [(d_out, d_in) for d_in, d_out in block] * model.depth


def fused(
    fishers: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], backend: str = BACKEND
) -> Tensor:
    """This library."""
    return FE.ewc_penalty(fishers, lora_as, lora_bs, None, EWC_LAMBDA, backend=backend)


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


def of_op_layer(inputs: Adapters, backend: str) -> Run:
    """One call of the op, without argument checks and autograd: the loss and all gradients in one tensor."""
    fishers, lora_as, lora_bs = (list(group) for group in inputs)
    none, ones = [None] * len(fishers), [1.0] * len(fishers)

    def run() -> list[Tensor]:
        with torch.no_grad():
            needs = [True, True, False]
            return list(
                _library.ewc_penalty(fishers, lora_as, lora_bs, none, ones, EWC_LAMBDA, needs, backend)
            )

    return run


def flat(results: list[Tensor]) -> list[Tensor]:
    """The loss, and dA and dB of each adapter in turn, as the op returns them."""
    loss, grads = results[0], results[1:]
    half = len(grads) // 2
    pairs = zip(grads[:half], grads[half:], strict=True)
    return [loss, torch.cat([t.flatten() for pair in pairs for t in pair])]


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


def build(planned: Planned, place: Place, sizes: list[tuple[int, int]], part: str) -> Case:
    """One case, or its LATER part: the compiled peer."""
    rank, precision = int(planned.shape["rank"]), str(planned.shape["precision"])
    dtype = DTYPES[planned.dtype.removeprefix("fisher ")]
    parameters = sum(d_out * d_in for d_out, d_in in sizes)
    fisher_bytes = float(parameters * dtype.itemsize)
    factor_bytes = 4.0 * rank * sum(d_out + d_in for d_out, d_in in sizes)
    buffers = [draw(sizes, rank, dtype, place) for _ in range(place.copies(fisher_bytes))]

    def provider(name: str, penalty: Penalty, role: str = "peer", backend: str = "") -> Provider:
        runs = turns(lambda one: with_gradients(penalty, one), buffers)
        return Provider(name, role=role, backend=backend, algorithm="one launch" if backend else "", **runs)

    if part == LATER:
        compiled = provider(COMPILED, place.compiled(eager))
        providers = [provider(AGAIN, fused, "variant", BACKEND), compiled]
    else:
        providers = [provider(OURS, fused, "ours", BACKEND)]
        if cuda_is_built():
            of_cuda = functools.partial(fused, backend="cuda")
            providers.append(provider(CUDA, of_cuda, "variant", "cuda"))
    if part == MAIN:
        stacks = turns(lambda one: with_gradients(stacked_over(one[0]), one), buffers)
        providers += [Provider("stacked bmm", **stacks), provider("eager autograd", eager)]
    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype,
        flops=6.0 * rank * parameters, bytes=fisher_bytes + 2 * factor_bytes,
        providers=providers, truth=lambda: exact(buffers[0]), tolerance=TOLERANCES[precision],
        product="tf32", precision=precision, floor_bytes=fisher_bytes if part == MAIN else None,
    )  # fmt: skip


def build_op_layer(planned: Planned, place: Place, sizes: list[tuple[int, int]], part: str) -> Case:
    """Small matrices, so that `host_seconds` is what a call of the op costs the host."""
    case = build(planned, place, sizes, part)
    inputs = draw(sizes, int(planned.shape["rank"]), torch.float32, place)
    providers = [
        dataclasses.replace(p, run=of_op_layer(inputs, p.backend), rotation=(), algorithm="the op alone")
        for p in case.providers
    ]
    return dataclasses.replace(case, providers=providers, truth=lambda: flat(exact(inputs)))


def _planned(model: Model, which: str, rank: int, dtype: str, precision: str, part: str = MAIN) -> Planned:
    sizes = matrices(model, which)
    shape = _shape(model.name, which, sizes, rank, precision)
    made = functools.partial(build, sizes=sizes, part=part)
    return Planned("ewc_penalty", shape, f"fisher {dtype}", made, COMPILED if part == LATER else OURS)


def _shape(
    model: str, which: str, sizes: list[tuple[int, int]], rank: int, precision: str
) -> dict[str, int | str]:
    """d_out and d_in are those of the first matrix."""
    d_out, d_in = sizes[0]
    return {
        "model": model, "linears": which, "matrices": len(sizes), "d_out": d_out, "d_in": d_in, "rank": rank,
        "precision": precision,
    }  # fmt: skip


def _small(sizes: Sizes) -> Iterator[Planned]:
    """Few or small adapters: what benchmarks.choose needs, and the host's time of a call."""
    rank, precision = sizes.slice_rank, "high"
    many = [(OP_WIDTH, OP_WIDTH)] * 2 * sizes.large.depth
    shape = _shape(OP_LAYER, f"{OP_WIDTH} x {OP_WIDTH}", many, rank, precision)
    made = functools.partial(build_op_layer, sizes=many, part=SMALL)
    yield Planned("ewc_penalty", shape, "fisher float32", made)
    for model, depth in (
        (sizes.small, 1),
        (sizes.small, sizes.small.depth),
        (sizes.base, 1),
        (sizes.base, 4),
    ):
        yield _planned(model._replace(depth=depth), "k, v", rank, "float32", precision, SMALL)


def plan(sizes: Sizes) -> Iterator[Planned]:
    """The published setting first: k and v of the large model, F in fp32, at every precision."""

    def all_of(which: str, rank: int, dtype: str, models: Sequence[Model]) -> Iterator[Planned]:
        for precision in PRECISIONS:
            for model in models:
                yield _planned(model, which, rank, dtype, precision)

    single, half = DTYPES
    yield from all_of("k, v", sizes.slice_rank, single, sizes.models)
    for precision in ("highest", "high"):
        yield _planned(sizes.large, "k, v", sizes.slice_rank, single, precision, LATER)
    yield from all_of("k, v", sizes.slice_rank, half, sizes.models)
    yield from _small(sizes)
    for rank in (sizes.slice_rank, sizes.rank):
        for dtype in DTYPES:
            yield from all_of("all linears", rank, dtype, [sizes.large])
    for dtype in DTYPES:
        yield from all_of("k, v", sizes.rank, dtype, sizes.models)
