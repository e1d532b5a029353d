# SPDX-License-Identifier: Apache-2.0
"""LoRA linear, one pass or both, compared with the frozen layer and with common compositions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_ewclora import functional as FE

from . import algorithms, extras, registry
from .case import Case, Provider, Run, Target
from .place import Place, turns
from .workload import BOTH, MAIN, Workload

OPS = ("lora_linear", "lora_linear_slices")
VIT_LIMIT = 1.06  # x frozen linear, at ViT shapes and the published rank 10
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}  # bf16 results and intermediates: a few times 2^-9
Method = Callable[..., Tensor]


def composition(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Three linears and a sum, as in PEFT's layer."""
    return linear(x, weight, bias) + linear(linear(x, a), b) * 1.0


def addmm(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank product accumulated onto the base product by BLAS."""
    return torch.addmm(linear(x, weight, bias), x @ a.t(), b.t())


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


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, call: Method = FE.lora_linear
) -> Tensor:
    """This library, or another function with the signature of the op."""
    return call(x, weight, bias, a, b, 1.0)


def composition_slices(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """k and v of a packed qkv concatenated with q, as users write it."""
    a_k, b_k, a_v, b_v = adapters
    q, k, v = linear(x, weight, bias).split(weight.shape[0] // 3, dim=-1)
    return torch.cat([q, k + linear(linear(x, a_k), b_k), v + linear(linear(x, a_v), b_v)], dim=-1)


def in_place_slices(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """k and v added to parts of the output of qkv, in place."""
    a_k, b_k, a_v, b_v = adapters
    d = weight.shape[0] // 3
    y = linear(x, weight, bias)
    y[..., d : 2 * d] += linear(linear(x, a_k), b_k)
    y[..., 2 * d :] += linear(linear(x, a_v), b_v)
    return y


def fused_slices(
    x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor, call: Method = FE.lora_linear_slices
) -> Tensor:
    """This library, or another function with the signature of the op."""
    a_k, b_k, a_v, b_v = adapters
    d = weight.shape[0] // 3
    slices = [(d, 2 * d, a_k, b_k, 1.0), (2 * d, 3 * d, a_v, b_v, 1.0)]
    return call(x, weight, bias, slices)


def frozen(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    """The layer without adapters."""
    return linear(x, weight, bias)


METHODS: dict[str, dict[str, Method]] = {
    "lora_linear": {
        registry.COMPOSITION: composition, registry.ADDMM: addmm, registry.UNSLOTH: InOrder.apply,
    },
    "lora_linear_slices": {
        registry.COMPOSITION: composition_slices, "added to slices in place": in_place_slices,
    },
}  # fmt: skip


class Inputs(NamedTuple):
    """Inputs of one case; `adapters` are A, B in turn."""

    x: Tensor
    fixed: tuple[Tensor, Tensor]
    adapters: list[Tensor]
    dy: Tensor


def draw(workload: Workload, place: Place) -> Inputs:
    """Random inputs of the usual sizes."""
    rows, d_in, d_out, rank = (workload.size(name) for name in ("rows", "d_in", "d_out", "rank"))
    width, count = (d_out // 3, 2) if workload.op == "lora_linear_slices" else (d_out, 1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, device=place.device).mul_(std).to(workload.torch_dtype)

    x, weight, bias = normal(rows, d_in), normal(d_out, d_in, std=d_in**-0.5), normal(d_out)
    adapters: list[Tensor] = []
    for _ in range(count):
        adapters += [normal(rank, d_in, std=d_in**-0.5), normal(width, rank, std=0.1)]
    for t in (x, *adapters):
        t.requires_grad_()
    return Inputs(x, (weight, bias), adapters, normal(rows, d_out))


def run_of(which: str, method: Method, inputs: Inputs, leaves: Sequence[Tensor] | None = None) -> Run:
    """Both passes, which return y and the gradients with respect to `leaves` (default: x and the adapters),
    or one of them with its part of the results."""
    x, fixed, adapters, dy = inputs
    wrt = [x, *adapters] if leaves is None else list(leaves)

    def both() -> list[Tensor]:
        y = method(x, *fixed, *adapters)
        return [y, *torch.autograd.grad(y, wrt, dy)]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [method(x, *fixed, *adapters)]

    held: list[Tensor] = []

    def backward() -> list[Tensor]:
        if not held:  # the graph is recorded once, on the stream that the backward pass will run on
            held.append(method(x, *fixed, *adapters))
        return list(torch.autograd.grad(held[0], wrt, dy, retain_graph=True))

    return {BOTH: both, "forward": forward, "backward": backward}[which]


def peft_run(which: str, inputs: Inputs) -> Run:
    """PEFT's own layer."""
    layer, factors = extras.peft_linear(*inputs.fixed, *inputs.adapters)
    return run_of(which, lambda x, *_: layer(x), inputs, [inputs.x, *factors])


def exact(workload: Workload, inputs: Inputs) -> list[Tensor]:
    """The same in fp64."""
    wide = [t.detach().double().requires_grad_() for t in (inputs.x, *inputs.adapters)]
    fixed = (inputs.fixed[0].double(), inputs.fixed[1].double())
    inputs64 = Inputs(wide[0], fixed, wide[1:], inputs.dy.double())
    return list(run_of(workload.which, METHODS[workload.op][registry.COMPOSITION], inputs64)())


def _ours(workload: Workload, place: Place, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    """Our backends; on a GPU, in the main part of a case, every algorithm of Triton as well."""
    slices = workload.op == "lora_linear_slices"
    method, op = (fused_slices, FE.lora_linear_slices) if slices else (fused, FE.lora_linear)
    for entry in place.entries(workload.part):
        for key in ("", *(algorithms.forced(entry) if workload.part == MAIN else ())):
            backend = f"{entry.backend}:{key}" if key else entry.backend
            bound = functools.partial(method, call=entry._replace(backend=backend).of(op))
            runs = turns(lambda inputs, m=bound: run_of(workload.which, m, inputs), buffers)
            name, role = (f"{entry.name} {backend}", "variant") if key else (entry.name, entry.role)
            known = entry.function is None
            algorithm = key or (algorithms.described(workload, place, entry) if known else "")
            guess = algorithms.predicted(workload, entry, key)
            yield Provider(
                name, role=role, backend=entry.recorded, algorithm=algorithm, predicted=guess, **runs
            )


def _peers(workload: Workload, place: Place, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    methods = METHODS[workload.op]
    for name in registry.peers(workload):
        if name == registry.PEFT:
            make = lambda inputs: extras.lazily(lambda: peft_run(workload.which, inputs))  # noqa: E731
        else:
            compiled = name == registry.COMPILED_COMPOSITION
            method = place.compiled(methods[registry.COMPOSITION]) if compiled else methods[name]
            make = functools.partial(run_of, workload.which, method)
        yield Provider(name, **turns(make, buffers))


def _targets(workload: Workload, place: Place) -> Sequence[Target]:
    """Targets on a CPU; those on a GPU are in goals.py."""
    if place.gpu:
        return ()
    targets = [Target("best peer", 1.0, "never slower than the best peer")]
    vit = str(workload.shape["model"]).startswith("ViT")
    if vit and workload.shape["rank"] == 10 and workload.size("rows") > 1024 and workload.dtype == "float32":
        targets.append(Target(registry.FROZEN, VIT_LIMIT, f"at most {VIT_LIMIT} x the frozen linear"))
    return targets


def build(workload: Workload, place: Place) -> Case:
    """One case or part: ours, the peers, and the frozen linear as a floor."""
    buffers = [draw(workload, place) for _ in range(place.copies(workload.work.bytes))]
    floor = turns(lambda inputs: run_of(workload.which, frozen, inputs, [inputs.x]), buffers)
    return Case.of(
        workload,
        providers=[
            *_ours(workload, place, buffers),
            *_peers(workload, place, buffers),
            Provider(registry.FROZEN, role="floor", **floor),
        ],
        truth=lambda: exact(workload, buffers[0]),
        tolerance=TOLERANCES[workload.dtype],
        targets=_targets(workload, place),
        product=place.product(workload.torch_dtype),
    )
