"""Exact per-sample Fisher of the linears of ViTs in bf16, and mode "batch"."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from .. import extras
from ..case import OURS, Case, Provider, Run
from ..fisher_accumulate import batch as of_batch
from ..fisher_accumulate import einsum, one_by_one, vmap_grad
from ..shapes import Model, Sizes
from .plan import BACKEND, CUDA, MAIN, SMALL, Place, Planned, cuda_is_built, turns

# Peers round per-sample gradients and their squares to bf16, each to 2^-9, before they sum.
TOLERANCE = 2e-2
Method = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]  # fisher, x, dy


def fused(fisher: Tensor, x: Tensor, dy: Tensor, mode: str, backend: str = BACKEND) -> Tensor:
    """This library."""
    return FE.fisher_accumulate_(fisher, x, dy, mode=mode, check_finite=False, backend=backend)


def product_and_square(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Mode "batch": the weight gradient by BLAS, then squared and added."""
    gradient = (dy.flatten(0, 1).T @ x.flatten(0, 1)).float()
    return fisher.addcmul_(gradient, gradient)


def of_backpack(inputs: Inputs) -> Run:
    """BackPACK's SumGradSquared of one linear layer."""
    _, x, dy = inputs
    return extras.lazily(lambda: extras.backpack_square_sum(x, dy))


def draw(planned: Planned, place: Place) -> Inputs:
    n, t, d_in, d_out = (int(planned.shape[name]) for name in ("samples", "tokens", "d_in", "d_out"))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=place.device).to(torch.bfloat16)

    return torch.zeros(d_out, d_in, device=place.device), normal(n, t, d_in), normal(n, t, d_out)


def accumulating(
    name: str, method: Method, buffers: list[Inputs], role: str = "peer", **more: Any
) -> Provider:
    """Timed adding to F as in use; checked from a zero F."""
    fisher, x, dy = buffers[0]
    runs = turns(lambda one: lambda: [method(*one)], buffers)
    check = lambda: [method(torch.zeros_like(fisher), x, dy)]  # noqa: E731
    return Provider(name, role=role, check=check, **runs, **more)


def build(planned: Planned, place: Place, part: str = MAIN) -> Case:
    n, t, d_in, d_out = (int(planned.shape[name]) for name in ("samples", "tokens", "d_in", "d_out"))
    mode = str(planned.shape["mode"])
    moved = 2.0 * n * t * (d_in + d_out) + 8.0 * d_in * d_out
    buffers = [draw(planned, place) for _ in range(place.copies(moved))]
    ours = functools.partial(fused, mode=mode)
    products = turns(lambda one: lambda: [one[2].flatten(0, 1).T @ one[1].flatten(0, 1)], buffers)
    providers = [
        accumulating(OURS, ours, buffers, "ours", backend=BACKEND, algorithm=f"mode {mode}"),
        Provider("cuBLAS weight gradient", role="floor", **products),
    ]
    if cuda_is_built():
        of_cuda = functools.partial(fused, mode=mode, backend="cuda")
        providers.append(
            accumulating(CUDA, of_cuda, buffers, "variant", backend="cuda", algorithm=f"mode {mode}")
        )
    peers = {"einsum (Opacus)": einsum, "torch.func vmap(grad)": vmap_grad, "batch size 1": one_by_one}
    if mode == "batch":
        peers = {"cuBLAS, then square and add": product_and_square}
    if part == MAIN:
        providers += [accumulating(name, method, buffers) for name, method in peers.items()]
    if part == MAIN and mode == "sample" and importlib.util.find_spec("backpack"):
        providers.append(Provider("backpack", **turns(of_backpack, buffers)))

    def truth() -> list[Tensor]:
        fisher, x, dy = buffers[0]
        if mode == "batch":
            return [of_batch(torch.zeros_like(fisher, dtype=torch.float64), x.double(), dy.double())]
        return [one_by_one(torch.zeros_like(fisher, dtype=torch.float64), x.double(), dy.double())]

    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype, flops=2.0 * n * t * d_in * d_out,
        bytes=moved, providers=providers, truth=truth, tolerance=TOLERANCE, product="bf16",
    )  # fmt: skip


def _planned(
    model: Model, name: str, mode: str, samples: int, tokens: int | None = None, part: str = MAIN
) -> Planned:
    d_in, d_out = model.linears()[name]
    shape: dict[str, int | str] = {
        "model": model.name, "linear": name, "mode": mode, "samples": samples,
        "tokens": tokens or model.tokens, "d_in": d_in, "d_out": d_out,
    }  # fmt: skip
    return Planned("fisher_accumulate", shape, "bfloat16", functools.partial(build, part=part))


def _small(sizes: Sizes) -> Iterator[Planned]:
    """One token, one sample and a few: what benchmarks.choose needs, the smallest first."""
    for samples, tokens in ((1, 1), (1, None), (8, None)):
        for model in (sizes.small, sizes.base):
            yield _planned(model, "proj", "sample", samples, tokens, SMALL)


def plan(sizes: Sizes) -> Iterator[Planned]:
    """Per-sample Fisher of the large model first: it has the targets."""
    for mode in ("sample", "batch"):
        for model in (sizes.large, sizes.huge):
            for name in model.linears():
                yield _planned(model, name, mode, sizes.samples)
    yield from _small(sizes)
