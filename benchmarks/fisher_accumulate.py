"""Exact per-sample Fisher of one layer, against a plain product of its size and the methods in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from .case import OURS, Case, Provider, Target

SHAPES = (  # model, samples, tokens, d_in, d_out
    ("ViT-B k", 16, 197, 768, 768),
    ("ViT-B fc1", 16, 197, 768, 3072),
    ("ViT-L k", 16, 197, 1024, 1024),
    ("ViT-B head, one token", 256, 1, 768, 768),
)
MODES = ("sample", "batch")


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


def cases() -> Iterator[Case]:
    """Layers of ViT-B and ViT-L with 16 samples of 197 tokens, a one-token layer, and mode "batch"."""
    for model, n, t, d_in, d_out in SHAPES:
        x, dy = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
        for mode in MODES:
            if mode == "batch" and model != "ViT-B k":
                continue

            def fused(fisher: Tensor, x: Tensor, dy: Tensor, mode: str = mode) -> Tensor:
                return FE.fisher_accumulate_(fisher, x, dy, mode=mode, check_finite=False)

            def start_from_zero(method, x=x, dy=dy):  # type: ignore[no-untyped-def]
                fisher = torch.zeros(dy.shape[-1], x.shape[-1])
                return lambda: [method(fisher.zero_(), x, dy)]

            peers = {"einsum": einsum, "torch.func vmap(grad)": vmap_grad, "batch size 1": one_by_one}
            if mode == "batch":
                peers = {"product, then square and add": batch}
            x2, dy2 = x.flatten(0, 1), dy.flatten(0, 1)
            yield Case(
                op="fisher_accumulate",
                shape={"model": model, "samples": n, "tokens": t, "d_in": d_in, "d_out": d_out, "mode": mode},
                dtype="float32",
                flops=2.0 * n * t * d_in * d_out,
                bytes=4.0 * (n * t * (d_in + d_out) + 2 * d_in * d_out),
                providers=[
                    Provider(
                        OURS,
                        start_from_zero(fused),
                        role="ours",
                        backend="cpu",
                        algorithm="C++ tiled product",
                    ),
                    *(Provider(name, start_from_zero(method)) for name, method in peers.items()),
                    Provider("sgemm of equal FLOPs", lambda a=dy2, b=x2: [a.T @ b], role="floor"),  # type: ignore[misc]
                ],
                truth=lambda x=x, dy=dy, mode=mode: [  # type: ignore[misc]
                    (one_by_one if mode == "sample" else batch)(
                        torch.zeros(dy.shape[-1], x.shape[-1], dtype=torch.float64), x.double(), dy.double()
                    )
                ],
                tolerance=1e-5,
                targets=[Target("sgemm of equal FLOPs", 1.2, "at most 1.2 x one sgemm of the same FLOPs")]
                if t > 1 and mode == "sample"
                else [],
            )
