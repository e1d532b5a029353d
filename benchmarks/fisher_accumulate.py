# SPDX-License-Identifier: Apache-2.0
"""Exact per-sample Fisher of one layer, compared with a product of equal size and with common methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from . import extras, registry
from .case import Case, Provider, Run, Target
from .place import Place, turns
from .workload import Workload

OPS = ("fisher_accumulate",)
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # peers round gradients and squares to bf16, 2^-9 each
# Scratch memory of a thread: a block of F and panels of part of a sample. One dense gradient of ViT-B's
# smallest linear is larger, so a peak below this shows that no gradient is stored.
TILE_BYTES = 2 * 2**20
Method = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = functools.partial(FE.fisher_accumulate_, check_finite=False)
Inputs = tuple[Tensor, Tensor, Tensor]  # fisher, x, dy


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


def product(x: Tensor, dy: Tensor) -> Tensor:
    """The weight gradient of the batch, by BLAS."""
    return dy.flatten(0, 1).T @ x.flatten(0, 1)


def batch(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of the batch by one product, squared and added."""
    gradient = product(x, dy).to(fisher.dtype)
    return fisher.addcmul_(gradient, gradient)


METHODS: dict[str, Method] = {
    "einsum": einsum, "torch.func vmap(grad)": vmap_grad, registry.LOOP: one_by_one,
    registry.BATCH_MODE_PEERS[0]: batch,
}  # fmt: skip
# These compute the sum for one batch; several batches take one more addition each.
INSTALLED: dict[str, Callable[[Tensor, Tensor], Run]] = {
    registry.BACKPACK: extras.backpack_square_sum, registry.OPACUS: extras.opacus_square_sum,
}  # fmt: skip


def draw(workload: Workload, place: Place) -> Inputs:
    """A Fisher of zeros, and random x and dy."""
    n, t, d_in, d_out = (workload.size(name) for name in ("samples", "tokens", "d_in", "d_out"))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=place.device).to(workload.torch_dtype)

    return torch.zeros(d_out, d_in, device=place.device), normal(n, t, d_in), normal(n, t, d_out)


def _accumulating(
    name: str, method: Method, buffers: Sequence[Inputs], role: str = "peer", backend: str = "",
    algorithm: str = "",
) -> Provider:  # fmt: skip
    """Timed while adding to F, as in training; checked on a zero F."""
    fisher, x, dy = buffers[0]
    runs = turns(lambda inputs: lambda: [method(*inputs)], buffers)
    check = lambda: [method(torch.zeros_like(fisher), x, dy)]  # noqa: E731
    return Provider(name, role=role, backend=backend, algorithm=algorithm, check=check, **runs)


def _ours(workload: Workload, place: Place, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    mode = str(workload.shape["mode"])
    for entry in place.entries(workload.part):
        method = functools.partial(entry.of(OURS), mode=mode)
        told = entry.described(f"mode {mode}")
        yield _accumulating(entry.name, method, buffers, entry.role, entry.recorded, told)


def _peers(workload: Workload, buffers: Sequence[Inputs]) -> Iterator[Provider]:
    for name in registry.peers(workload):
        if name in METHODS:
            yield _accumulating(name, METHODS[name], buffers)
        else:
            make = INSTALLED[name]
            runs = turns(lambda b, m=make: extras.lazily(lambda: m(b[1], b[2])), buffers)
            yield Provider(name, **runs)


def exact(workload: Workload, inputs: Inputs) -> list[Tensor]:
    """The same in fp64."""
    fisher, x, dy = inputs
    method = one_by_one if workload.shape["mode"] == "sample" else batch
    return [method(torch.zeros_like(fisher, dtype=torch.float64), x.double(), dy.double())]


def _targets(workload: Workload, place: Place) -> list[Target]:
    """Targets on a CPU; those on a GPU are in goals.py."""
    if (
        place.gpu
        or workload.size("tokens") == 1
        or workload.shape["mode"] != "sample"
        or workload.dtype != "float32"
    ):
        return []
    tile = f"no temporaries beside {TILE_BYTES >> 20} MiB of tiles per thread"
    allowed = float(torch.get_num_threads() * TILE_BYTES)
    return [
        Target(registry.product_floor(workload), 1.2, "at most 1.2 x one sgemm of the same FLOPs"),
        Target(None, 0.0, tile, "peak_bytes", allowance=allowed),
    ]


def build(workload: Workload, place: Place) -> Case:
    """One case or part: ours, the peers, and one product of as many FLOPs."""
    buffers = [draw(workload, place) for _ in range(place.copies(workload.work.bytes))]
    products = turns(lambda inputs: lambda: [product(*inputs[1:])], buffers)
    return Case.of(
        workload,
        providers=[
            *_ours(workload, place, buffers),
            *_peers(workload, buffers),
            Provider(registry.product_floor(workload), role="floor", **products),
        ],
        truth=lambda: exact(workload, buffers[0]),
        tolerance=TOLERANCES[workload.dtype],
        targets=_targets(workload, place),
        product=place.product(workload.torch_dtype),
    )
