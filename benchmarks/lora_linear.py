"""LoRA linear, forward and backward, against the frozen layer and the compositions in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_ewclora import functional as FE

from .case import OURS, Case, Provider, Target

SHAPES = (  # model, rows, d_in, d_out, rank
    ("ViT-B proj", 16 * 197, 768, 768, 10),
    ("ViT-B fc1", 16 * 197, 768, 3072, 10),
    ("ViT-B fc2", 16 * 197, 3072, 768, 10),
    ("ViT-L proj", 16 * 197, 1024, 1024, 10),
    ("ViT-B proj", 16 * 197, 768, 768, 30),
    ("ViT-B proj, one image", 197, 768, 768, 10),
    ("ViT-B proj, 16 rows", 16, 768, 768, 10),
)
VIT_LIMIT = 1.06  # x frozen linear, at ViT shapes and the published rank 10


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


def _case(model: str, rows: int, d_in: int, d_out: int, rank: int, slices: bool) -> Case:
    x = torch.randn(rows, d_in, requires_grad=True)
    fixed = (torch.randn(d_out, d_in) / d_in**0.5, torch.randn(d_out))
    width, count = (d_out // 3, 2) if slices else (d_out, 1)
    adapters: list[Tensor] = []
    for _ in range(count):
        adapters += [torch.randn(rank, d_in) / d_in**0.5, torch.randn(width, rank) * 0.1]
    for t in adapters:
        t.requires_grad_()
    dy = torch.randn(rows, d_out)
    ours, plain = (fused_slices, composition_slices) if slices else (fused, composition)
    methods = {"composition": plain} if slices else {"composition": plain, "addmm": addmm}
    methods["torch.compile of the composition"] = torch.compile(plain)

    def provider(
        name: str, method: Callable[..., Tensor], role: str = "peer", backend: str = "", algorithm: str = ""
    ) -> Provider:
        run = forward_backward(method, x, fixed, adapters, dy)
        return Provider(name, run, role, backend, algorithm)

    def frozen() -> list[Tensor]:
        y = linear(x, *fixed)
        return [y, *torch.autograd.grad(y, [x], dy)]

    def truth() -> list[Tensor]:
        wide = [t.detach().double().requires_grad_() for t in (x, *adapters)]
        fixed64 = (fixed[0].double(), fixed[1].double())
        return forward_backward(plain, wide[0], fixed64, wide[1:], dy.double())()

    low_rank = 6.0 * 2.0 * rows * rank * (d_in + width) * count / 2
    vit = rank == 10 and rows > 1000
    return Case(
        op="lora_linear_slices" if slices else "lora_linear",
        shape={"model": model, "rows": rows, "d_in": d_in, "d_out": d_out, "rank": rank},
        dtype="float32",
        flops=4.0 * rows * d_in * d_out + low_rank,
        bytes=4.0 * (2 * rows * (d_in + d_out) + 2 * d_in * d_out),
        providers=[
            provider(OURS, ours, "ours", "cpu", "C++ prologue into BLAS addmm"),
            *(provider(name, method) for name, method in methods.items()),
            Provider("frozen linear", frozen, role="floor"),
        ],
        truth=truth,
        tolerance=1e-5,
        targets=[
            Target("best peer", 1.0, "never slower than the best peer"),
            *(
                [Target("frozen linear", VIT_LIMIT, f"at most {VIT_LIMIT} x the frozen linear")]
                if vit
                else []
            ),
        ],
    )


def cases() -> Iterator[Case]:
    """Linears of ViT-B and ViT-L, small batches, and k,v of a packed qkv."""
    for shape in SHAPES:
        yield _case(*shape, slices=False)
    yield _case("ViT-B qkv, slices k,v", 16 * 197, 768, 2304, 10, slices=True)
