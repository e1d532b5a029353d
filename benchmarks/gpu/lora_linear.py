"""LoRA linear in bf16, forward and backward: the linears of ViTs, and k,v of a packed qkv."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_ewclora.backends.candidate import Call, LinearShape, bucket
from fused_ewclora.ops._dispatch import choose

from .. import extras, predict
from ..case import OURS, Case, Provider, Run
from ..lora_linear import composition, composition_slices, forward_backward, fused, fused_slices
from ..shapes import Model, Sizes
from .plan import AGAIN, ALGORITHMS, BACKEND, CUDA, LATER, MAIN, SMALL, Place, Planned, cuda_is_built, turns

DTYPE = torch.bfloat16
PASSES = ("forward+backward", "forward", "backward")
TOLERANCE = 1e-2  # bf16 results and bf16 intermediates of peers: a few times 2^-9
COMPILED = "torch.compile of the composition"
Method = Callable[..., Tensor]


class Inputs(NamedTuple):
    x: Tensor
    fixed: tuple[Tensor, Tensor]
    adapters: list[Tensor]  # A, B, in turn
    dy: Tensor


class InOrder(torch.autograd.Function):
    """The order of Unsloth's kernels: BLAS products, the low-rank ones accumulated in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        z = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, z)
        return linear(x, weight, bias).addmm_(z, b.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, z = ctx.saved_tensors
        u = dy @ b
        return (dy @ weight).addmm_(u, a), None, None, u.t() @ x, dy.t() @ z


def in_place_slices(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """k and v added to parts of the output of qkv, in place."""
    a_k, b_k, a_v, b_v = adapters
    d = weight.shape[0] // 3
    y = linear(x, weight, bias)
    y[..., d : 2 * d] += linear(linear(x, a_k), b_k)
    y[..., 2 * d :] += linear(linear(x, a_v), b_v)
    return y


def frozen(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return linear(x, weight, bias)


def draw(planned: Planned, place: Place, slices: bool) -> Inputs:
    shape = planned.shape
    rows, d_in, d_out, rank = (int(shape[name]) for name in ("rows", "d_in", "d_out", "rank"))

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, device=place.device) * std).to(DTYPE)

    width, count = (d_out // 3, 2) if slices else (d_out, 1)
    adapters = []
    for _ in range(count):
        adapters += [normal(rank, d_in, std=d_in**-0.5), normal(width, rank, std=0.1)]
    x = normal(rows, d_in)
    for t in (x, *adapters):
        t.requires_grad_()
    fixed = (normal(d_out, d_in, std=d_in**-0.5), normal(d_out))
    return Inputs(x, fixed, adapters, normal(rows, d_out))


def _run(which: str, method: Method, inputs: Inputs, wrt: list[Tensor] | None = None) -> Run:
    """One pass; results are y, or gradients, or both. `wrt` are the leaves."""
    x, fixed, adapters, dy = inputs
    leaves = [x, *adapters] if wrt is None else wrt

    def both() -> list[Tensor]:
        y = method(x, *fixed, *adapters)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [method(x, *fixed, *adapters)]

    held: list[Tensor] = []

    def backward() -> list[Tensor]:
        if not held:  # the graph is recorded once, on the stream that the backward pass will run on
            held.append(method(x, *fixed, *adapters))
        return list(torch.autograd.grad(held[0], leaves, dy, retain_graph=True))

    return {"forward+backward": both, "forward": forward, "backward": backward}[which]


def _peft_run(which: str, inputs: Inputs) -> Run:
    """The layer of the installed PEFT, with our adapters."""
    layer, leaves = extras.peft_linear(*inputs.fixed, *inputs.adapters)
    return _run(which, lambda x, *_: layer(x), inputs, [inputs.x, *leaves])


def _sizes(planned: Planned) -> tuple[int, int, int, int]:
    rows, d_in, d_out, rank = (int(planned.shape[name]) for name in ("rows", "d_in", "d_out", "rank"))
    return rows, d_in, d_out, rank


def work(planned: Planned, slices: bool) -> tuple[float, float]:
    """FLOPs and bytes: x, W, y in the forward pass; dy, x, W, dx in the backward pass."""
    rows, d_in, d_out, rank = _sizes(planned)
    adapters, width = (2, 2 * d_out // 3) if slices else (1, d_out)
    base, low_rank = 2.0 * rows * d_in * d_out, 2.0 * rows * rank * (adapters * d_in + width)
    forward = base + low_rank, rows * (d_in + d_out) + d_in * d_out
    backward = base + 2 * low_rank, rows * (2 * d_in + d_out) + d_in * d_out
    each = {"forward": forward, "backward": backward}
    parts = [each[name] for name in str(planned.shape["pass"]).split("+")]
    return sum(flops for flops, _ in parts), 2.0 * sum(elements for _, elements in parts)


def chosen(which: str, backend: str, place: Place, rows: int, d_in: int, d_out: int, rank: int) -> str:
    """The algorithms that serve the passes, in words."""
    shape = LinearShape(bucket(rows), d_in, d_out, rank)
    call = Call(place.device, DTYPE, None if place.rehearsal else predict.arch(), shape)
    ops = {"forward": "lora_linear", "backward": "lora_linear_backward"}
    return "; ".join(choose(ops[part], backend, call).algorithm for part in which.split("+"))


def _providers(
    planned: Planned, place: Place, buffers: list[Inputs], slices: bool, part: str
) -> Iterator[Provider]:
    which = str(planned.shape["pass"])
    rows, d_in, d_out, rank = _sizes(planned)
    ours, plain = (fused_slices, composition_slices) if slices else (fused, composition)

    def provider(name: str, method: Method, role: str = "peer", **more: Any) -> Provider:
        return Provider(name, role=role, **turns(lambda one: _run(which, method, one), buffers), **more)

    def of_ours(name: str, role: str, key: str = "", backend: str = BACKEND) -> Provider:
        total = 2 * rank if slices else rank
        algorithm = key or chosen(which, backend, place, rows, d_in, d_out, total)
        modelled = which == "forward" and backend == BACKEND
        guess = predict.forward(key, rows, d_in, d_out, total, DTYPE) if modelled else None
        method = functools.partial(ours, backend=f"{backend}:{key}" if key else backend)
        return provider(name, method, role, backend=backend, algorithm=algorithm, predicted=guess)

    if part == LATER:
        yield of_ours(AGAIN, "variant")
        yield provider(COMPILED, place.compiled(plain))
        if not slices and importlib.util.find_spec("peft"):
            yield Provider("peft", **turns(lambda one: extras.lazily(lambda: _peft_run(which, one)), buffers))
        return
    yield of_ours(OURS, "ours")
    if cuda_is_built():
        yield of_ours(CUDA, "variant", backend="cuda")
    base = turns(lambda one: _run(which, frozen, one, [one.x]), buffers)
    yield Provider("frozen linear", role="floor", **base)
    yield provider("composition (PEFT's)", plain)
    if part == SMALL:
        return
    if slices:
        yield provider("added to slices in place", in_place_slices)
    else:
        yield provider("cuBLAS addmm (Unsloth's order)", InOrder.apply)
    for key in ALGORITHMS:
        yield of_ours(f"{OURS} {BACKEND}:{key}", "variant", key)


def build(planned: Planned, place: Place, slices: bool, part: str) -> Case:
    """One case, or its LATER part: peers that take long to get ready."""
    flops, bytes_moved = work(planned, slices)
    buffers = [draw(planned, place, slices) for _ in range(place.copies(bytes_moved))]
    plain = composition_slices if slices else composition

    def truth() -> list[Tensor]:
        one = buffers[0]
        wide = [t.detach().double().requires_grad_() for t in (one.x, *one.adapters)]
        fixed = (one.fixed[0].double(), one.fixed[1].double())
        both = forward_backward(plain, wide[0], fixed, wide[1:], one.dy.double())()
        return {"forward+backward": both, "forward": both[:1], "backward": both[1:]}[
            str(planned.shape["pass"])
        ]

    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype, flops=flops, bytes=bytes_moved,
        providers=list(_providers(planned, place, buffers, slices, part)),
        truth=truth, tolerance=TOLERANCE, product="bf16",
    )  # fmt: skip


def _planned(
    model: Model, name: str, which: str, sizes: Sizes, slices: bool, part: str = MAIN, rows: int | None = None
) -> Planned:
    d_in, d_out = model.linears()[name]
    shape: dict[str, int | str] = {
        "model": model.name, "linear": name, "pass": which, "rows": rows or sizes.samples * model.tokens,
        "d_in": d_in, "d_out": d_out, "rank": sizes.slice_rank if slices else sizes.rank,
    }  # fmt: skip
    op = "lora_linear_slices" if slices else "lora_linear"
    made = functools.partial(build, slices=slices, part=part)
    return Planned(op, shape, "bfloat16", made, COMPILED if part == LATER else OURS)


def _small(sizes: Sizes) -> Iterator[Planned]:
    """One token, one sample and a few: what benchmarks.choose needs, the smallest first."""
    for rows in (1, sizes.base.tokens, 8 * sizes.base.tokens):
        for which in PASSES[1:]:
            for model, name in ((sizes.small, "proj"), (sizes.base, "proj"), (sizes.base, "fc1")):
                yield _planned(model, name, which, sizes, False, SMALL, rows)


def plan(sizes: Sizes) -> Iterator[Planned]:
    """Both passes first: they have the targets. Compiled peers only for both passes of the large model."""

    def layers(model: Model, which: str, part: str = MAIN) -> Iterator[Planned]:
        for name in model.linears():
            yield _planned(model, name, which, sizes, False, part)
        yield _planned(model, "qkv", which, sizes, True, part)

    both, *single = PASSES
    for model in sizes.models:
        yield from layers(model, both)
    for which in single:
        yield from layers(sizes.large, which)
    yield from layers(sizes.large, both, LATER)
    yield from _small(sizes)
    for which in single:
        for model in (sizes.base, sizes.huge):
            yield from layers(model, which)
