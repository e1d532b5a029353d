"""LoRA linear, forward and backward, against the frozen layer and the compositions in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_ewclora import functional as FE

from . import extras, registry
from .case import OURS, Case, Provider, Run, Target
from .registry import Workload

OPS = ("lora_linear", "lora_linear_slices")
VIT_LIMIT = 1.06  # x frozen linear, at ViT shapes and the published rank 10
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}  # bf16 results and intermediates: a few times 2^-9


def composition(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Three linears and a sum, as PEFT's layer computes."""
    return linear(x, weight, bias) + linear(linear(x, a), b) * 1.0


def addmm(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The low-rank product accumulated onto the base product by BLAS."""
    return torch.addmm(linear(x, weight, bias), x @ a.t(), b.t())


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, backend: str | None = None
) -> Tensor:
    """This library."""
    return FE.lora_linear(x, weight, bias, a, b, 1.0, backend=backend)


def composition_slices(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
    """k and v of a packed qkv by adding to parts of its output, which is what users write by hand."""
    a_k, b_k, a_v, b_v = adapters
    q, k, v = linear(x, weight, bias).split(weight.shape[0] // 3, dim=-1)
    return torch.cat([q, k + linear(linear(x, a_k), b_k), v + linear(linear(x, a_v), b_v)], dim=-1)


def fused_slices(
    x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor, backend: str | None = None
) -> Tensor:
    """This library."""
    a_k, b_k, a_v, b_v = adapters
    d = weight.shape[0] // 3
    slices = [(d, 2 * d, a_k, b_k, 1.0), (2 * d, 3 * d, a_v, b_v, 1.0)]
    return FE.lora_linear_slices(x, weight, bias, slices, backend=backend)


def forward_backward(
    method: Callable[..., Tensor], x: Tensor, fixed: tuple[Tensor, Tensor], adapters: list[Tensor], dy: Tensor
) -> Callable[[], list[Tensor]]:
    """One forward and backward; results are y and the gradients."""

    def run() -> list[Tensor]:
        y = method(x, *fixed, *adapters)
        return [y, *torch.autograd.grad(y, [x, *adapters], dy)]

    return run


class Inputs(NamedTuple):
    """Of one case; `adapters` are A, B in turn."""

    x: Tensor
    fixed: tuple[Tensor, Tensor]
    adapters: list[Tensor]
    dy: Tensor


def draw(one: Workload) -> Inputs:
    """Random inputs of the usual sizes."""
    rows, d_in, d_out, rank = (one.size(name) for name in ("rows", "d_in", "d_out", "rank"))
    width, count = (d_out // 3, 2) if one.op == "lora_linear_slices" else (d_out, 1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size).mul_(std).to(one.torch_dtype)

    x, weight, bias = normal(rows, d_in), normal(d_out, d_in, std=d_in**-0.5), normal(d_out)
    adapters: list[Tensor] = []
    for _ in range(count):
        adapters += [normal(rank, d_in, std=d_in**-0.5), normal(width, rank, std=0.1)]
    for t in (x, *adapters):
        t.requires_grad_()
    return Inputs(x, (weight, bias), adapters, normal(rows, d_out))


def peft_run(inputs: Inputs) -> Run:
    """PEFT's own layer."""
    x, fixed, adapters, dy = inputs
    layer, factors = extras.peft_linear(*fixed, *adapters)

    def run() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *factors], dy)]

    return run


def _peers(inputs: Inputs, slices: bool) -> list[Provider]:
    x, fixed, adapters, dy = inputs
    plain = composition_slices if slices else composition
    methods: dict[str, Callable[..., Tensor]] = {"composition": plain}
    if not slices:
        methods["addmm"] = addmm
    methods[registry.COMPILED_COMPOSITION] = extras.compiled(plain)
    found = [Provider(name, forward_backward(f, x, fixed, adapters, dy)) for name, f in methods.items()]
    if not slices:
        found.append(Provider(registry.PEFT, extras.lazily(lambda: peft_run(inputs))))
    return found


def _targets(one: Workload) -> Sequence[Target]:
    targets = [Target("best peer", 1.0, "never slower than the best peer")]
    vit = str(one.shape["model"]).startswith("ViT")
    if vit and one.shape["rank"] == 10 and one.size("rows") > 1000 and one.dtype == "float32":
        targets.append(Target("frozen linear", VIT_LIMIT, f"at most {VIT_LIMIT} x the frozen linear"))
    return targets


def build(one: Workload) -> Case:
    """One case: ours, the peers, and the frozen linear below them."""
    slices = one.op == "lora_linear_slices"
    inputs = draw(one)
    x, fixed, adapters, dy = inputs

    def frozen() -> list[Tensor]:
        y = linear(x, *fixed)
        return [y, *torch.autograd.grad(y, [x], dy)]

    def truth() -> list[Tensor]:
        plain = composition_slices if slices else composition
        wide = [t.detach().double().requires_grad_() for t in (x, *adapters)]
        fixed64 = (fixed[0].double(), fixed[1].double())
        return forward_backward(plain, wide[0], fixed64, wide[1:], dy.double())()

    ours = forward_backward(fused_slices if slices else fused, x, fixed, adapters, dy)
    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            Provider(OURS, ours, "ours", "cpu", "C++ prologue into BLAS addmm"),
            *_peers(inputs, slices),
            Provider("frozen linear", frozen, role="floor"),
        ],
        truth=truth,
        tolerance=TOLERANCES[one.dtype],
        targets=_targets(one),
        product={"float32": "fp32", "bfloat16": "bf16"}[one.dtype],
    )
