"""Exact per-sample Fisher of one layer, against a plain product of its size and the methods in use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from . import extras, registry
from .case import OURS, Case, Provider, Run, Target
from .registry import Workload

OPS = ("fisher_accumulate",)
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # peers round gradients and squares to bf16, 2^-9 each
# Scratch of a thread: a block of F, the panels of a part of a sample. One dense gradient of ViT-B's smallest
# linear is larger, so no gradient is ever stored.
TILE_BYTES = 2 * 2**20
Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_by_one(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Batch size 1: one gradient at a time, squared and added."""
    for x_n, dy_n in zip(x, dy, strict=True):
        fisher += (dy_n.T @ x_n).square_()
    return fisher


def einsum(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """The grad-sampler method: all per-sample gradients as one tensor, then squared and summed."""
    return fisher.add_(torch.einsum("nto,nti->noi", dy, x).square_().sum(0))


def vmap_grad(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """torch.func: gradient of one sample with respect to the weight, mapped over the samples."""

    def loss(weight: Tensor, x_n: Tensor, dy_n: Tensor) -> Tensor:
        return (torch.nn.functional.linear(x_n, weight) * dy_n).sum()

    weight = torch.zeros_like(fisher, dtype=x.dtype)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, x, dy)
    return fisher.add_(gradients.square_().sum(0))


def batch(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of the batch by one product, squared and added."""
    gradient = dy.flatten(0, 1).T @ x.flatten(0, 1)
    return fisher.addcmul_(gradient, gradient)


def _run(method: Method, x: Tensor, dy: Tensor) -> Run:
    """Adds to a Fisher that starts from zero, so that the result can be checked."""
    fisher = torch.zeros(dy.shape[-1], x.shape[-1])
    return lambda: [method(fisher.zero_(), x, dy)]


def _peers(mode: str, x: Tensor, dy: Tensor) -> list[Provider]:
    if mode == "batch":
        return [Provider(registry.BATCH_MODE_PEERS[0], _run(batch, x, dy))]
    methods = {"einsum": einsum, "torch.func vmap(grad)": vmap_grad, "batch size 1": one_by_one}
    # These give the sum for one batch; that of several is one addition more.
    installed = {
        registry.BACKPACK: lambda: extras.backpack_square_sum(x, dy),
        registry.OPACUS: lambda: extras.opacus_square_sum(x, dy),
    }
    return [
        *(Provider(name, _run(method, x, dy)) for name, method in methods.items()),
        *(Provider(name, extras.lazily(make)) for name, make in installed.items()),
    ]


def _targets(one: Workload, threads: int) -> list[Target]:
    if one.size("tokens") == 1 or one.shape["mode"] != "sample" or one.dtype != "float32":
        return []
    tile = f"no temporaries beside {TILE_BYTES >> 20} MiB of tiles per thread"
    return [
        Target("sgemm of equal FLOPs", 1.2, "at most 1.2 x one sgemm of the same FLOPs"),
        Target(None, 0.0, tile, "peak_bytes", allowance=float(threads * TILE_BYTES)),
    ]


def build(one: Workload) -> Case:
    """One case: ours, the peers, and one product of as many FLOPs."""
    n, t, d_in, d_out = (one.size(name) for name in ("samples", "tokens", "d_in", "d_out"))
    mode = str(one.shape["mode"])
    x, dy = torch.randn(n, t, d_in).to(one.torch_dtype), torch.randn(n, t, d_out).to(one.torch_dtype)

    def fused(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return FE.fisher_accumulate_(fisher, x, dy, mode=mode, check_finite=False)

    def truth() -> list[Tensor]:
        exact = one_by_one if mode == "sample" else batch
        return [exact(torch.zeros(d_out, d_in, dtype=torch.float64), x.double(), dy.double())]

    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            Provider(OURS, _run(fused, x, dy), "ours", "cpu", "C++ tiled product"),
            *_peers(mode, x, dy),
            Provider("sgemm of equal FLOPs", lambda: [dy.flatten(0, 1).T @ x.flatten(0, 1)], role="floor"),
        ],
        truth=truth,
        tolerance=TOLERANCES[one.dtype],
        targets=_targets(one, torch.get_num_threads()),
        product={"float32": "fp32", "bfloat16": "bf16"}[one.dtype],
    )
