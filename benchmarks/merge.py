"""Merging adapters into weights, one layer and all of a model, and the soft threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from . import registry
from .case import Case, Provider
from .place import Entry, Place, turns
from .workload import MAIN, Workload, matrices

OPS = ("merge", "soft_threshold")
SCALE = 1e-3  # W stays near where it started, however often a run is repeated
KAPPA = 1e-6
MERGED = {"float32": 1e-6, "bfloat16": 4e-3}  # relative error: roundings of W
Layers = list[tuple[Tensor, Tensor, Tensor]]  # W, A, B
Merge = Callable[[Layers], list[Tensor]]
Vectors = Sequence[Tensor]


def fused(layers: Layers, backend: str | None = None) -> list[Tensor]:
    """This library, all layers in one call."""
    weights, lora_as, lora_bs = (list(group) for group in zip(*layers, strict=True))
    return list(FE.merge_(weights, lora_as, lora_bs, SCALE, backend=backend))


def in_low_precision(layers: Layers) -> list[Tensor]:
    """BLAS adds the product to W, in its dtype."""
    return [w.addmm_(b.to(w.dtype), a.to(w.dtype), alpha=SCALE) for w, a, b in layers]


def in_fp32(layers: Layers) -> list[Tensor]:
    """An explicit fp32 sum, rounded once."""
    return [w.copy_(w.float() + SCALE * (b @ a)) for w, a, b in layers]


MERGES: dict[str, Merge] = dict(zip(registry.PEERS["merge"], (in_low_precision, in_fp32), strict=True))


def _of_copies(merge: Merge, layers: Layers) -> Callable[[], list[Tensor]]:
    return lambda: merge([(w.clone(), a, b) for w, a, b in layers])


def _build_merge(one: Workload, place: Place) -> Case:
    rank, dtype = one.size("rank"), one.torch_dtype

    def draw() -> Layers:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=place.device)

        return [(normal(m, n).to(dtype), normal(rank, n), normal(m, rank)) for m, n in matrices(one)]

    buffers = [draw() for _ in range(place.copies(one.work.bytes))]
    start = [(w.clone(), a, b) for w, a, b in buffers[0]]

    def provider(
        name: str, merge: Merge, role: str = "peer", backend: str = "", algorithm: str = ""
    ) -> Provider:
        runs = turns(lambda layers: lambda: merge(layers), buffers)
        return Provider(
            name, role=role, backend=backend, algorithm=algorithm, check=_of_copies(merge, start), **runs
        )

    def ours(entry: Entry) -> Provider:
        method: Merge = lambda layers: fused(layers, entry.backend)  # noqa: E731
        return provider(entry.name, method, entry.role, entry.told, "one pass over W")

    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            *(ours(entry) for entry in place.entries(one.part)),
            *(provider(name, MERGES[name]) for name in registry.peers(one)),
        ],
        truth=lambda: [w.double() + SCALE * (b.double() @ a.double()) for w, a, b in start],
        tolerance=MERGED[one.dtype],
        product=place.single,
        floor_bytes=one.work.bytes if one.part == MAIN else None,
    )


def foreach(scales: Vectors) -> Vectors:
    """All vectors by PyTorch's multi-tensor kernels: sign(s) max(|s| - kappa, 0)."""
    shrunk = torch._foreach_abs(scales)
    torch._foreach_sub_(shrunk, KAPPA)
    torch._foreach_clamp_min_(shrunk, 0.0)
    torch._foreach_mul_(shrunk, torch._foreach_sign(scales))
    torch._foreach_copy_(scales, shrunk)
    return scales


def _build_threshold(one: Workload, place: Place) -> Case:
    count, length = one.size("vectors"), one.size("length")
    copies = place.copies(one.work.bytes)
    buffers = [[torch.randn(length, device=place.device) for _ in range(count)] for _ in range(copies)]
    start = [s.clone() for s in buffers[0]]

    def provider(
        name: str, method: Callable[[Vectors], Vectors], role: str, backend: str = "", algorithm: str = ""
    ) -> Provider:
        runs = turns(lambda scales: lambda: method(scales), buffers)
        check = lambda: method([s.clone() for s in start])  # noqa: E731
        return Provider(name, role=role, backend=backend, algorithm=algorithm, check=check, **runs)

    def ours(entry: Entry) -> Provider:
        method = lambda scales: FE.soft_threshold_(scales, KAPPA, backend=entry.backend)  # noqa: E731
        return provider(entry.name, method, entry.role, entry.told, "in place")

    def truth() -> list[Tensor]:
        wide = [s.double() for s in start]
        return [s.sign() * (s.abs() - KAPPA).clamp_min(0.0) for s in wide]

    return Case(
        op=one.op,
        shape=one.shape,
        dtype=one.dtype,
        flops=one.work.flops,
        bytes=one.work.bytes,
        providers=[
            *(ours(entry) for entry in place.entries(one.part)),
            *(provider(name, foreach, "peer") for name in registry.peers(one)),
        ],
        truth=truth,
        tolerance=1e-6,
    )


def build(one: Workload, place: Place) -> Case:
    """One case: ours, and the peers."""
    return (_build_merge if one.op == "merge" else _build_threshold)(one, place)
