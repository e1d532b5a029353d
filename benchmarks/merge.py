# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into weights, one layer and all of a model, and the soft threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
Method = Callable[..., Sequence[Tensor]]
Vectors = list[Tensor]


def fused(layers: Layers, call: Method = FE.merge_) -> list[Tensor]:
    """This library, or another function with the signature of the op, all layers in one call."""
    weights, lora_as, lora_bs = (list(group) for group in zip(*layers, strict=True))
    return list(call(weights, lora_as, lora_bs, SCALE))


def in_low_precision(layers: Layers) -> list[Tensor]:
    """BLAS adds the product to W, in its dtype."""
    return [w.addmm_(b.to(w.dtype), a.to(w.dtype), alpha=SCALE) for w, a, b in layers]


def in_fp32(layers: Layers) -> list[Tensor]:
    """An explicit fp32 sum, rounded once."""
    return [w.copy_(w.float() + SCALE * (b @ a)) for w, a, b in layers]


MERGES: dict[str, Method] = dict(zip(registry.PEERS["merge"], (in_low_precision, in_fp32), strict=True))


def _providers(
    workload: Workload, place: Place, ours: Method, op: Method, peers: Mapping[str, Method],
    buffers: Sequence[Any], fresh: Callable[[], Any], algorithm: str,
) -> Iterator[Provider]:  # fmt: skip
    """Ours and the peers of an operation in place: timed on `buffers`, checked on new values from `fresh`."""

    def provider(entry: Entry, method: Method, algorithm: str = "") -> Provider:
        runs = turns(lambda values: lambda: method(values), buffers)
        return Provider(
            entry.name, role=entry.role, backend=entry.recorded, algorithm=algorithm,
            check=lambda: method(fresh()), **runs,
        )  # fmt: skip

    for entry in place.entries(workload.part):
        yield provider(entry, functools.partial(ours, call=entry.of(op)), entry.described(algorithm))
    for name in registry.peers(workload):
        yield provider(Entry(name, "peer", None, ""), peers[name])


def _build_merge(workload: Workload, place: Place) -> Case:
    rank, dtype = workload.size("rank"), workload.torch_dtype

    def draw() -> Layers:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=place.device)

        return [(normal(m, n).to(dtype), normal(rank, n), normal(m, rank)) for m, n in matrices(workload)]

    buffers = [draw() for _ in range(place.copies(workload.work.bytes))]
    start = [(w.clone(), a, b) for w, a, b in buffers[0]]

    def fresh() -> Layers:
        return [(w.clone(), a, b) for w, a, b in start]

    return Case.of(
        workload,
        providers=list(
            _providers(workload, place, fused, FE.merge_, MERGES, buffers, fresh, "one pass over W")
        ),
        truth=lambda: [w.double() + SCALE * (b.double() @ a.double()) for w, a, b in start],
        tolerance=MERGED[workload.dtype],
        product=place.single,
        floor_bytes=workload.work.bytes if workload.part == MAIN else None,
    )


def soft_threshold(scales: Vectors, call: Method = FE.soft_threshold_) -> Vectors:
    """This library, or another function with the signature of the op, all vectors in one call."""
    return list(call(scales, KAPPA))


def foreach(scales: Vectors) -> Vectors:
    """All vectors by PyTorch's multi-tensor kernels: sign(s) max(|s| - kappa, 0)."""
    shrunk = list(torch._foreach_abs(scales))
    torch._foreach_sub_(shrunk, KAPPA)
    torch._foreach_clamp_min_(shrunk, 0.0)
    torch._foreach_mul_(shrunk, list(torch._foreach_sign(scales)))
    torch._foreach_copy_(scales, shrunk)
    return scales


def _build_threshold(workload: Workload, place: Place) -> Case:
    count, length = workload.size("vectors"), workload.size("length")
    copies = place.copies(workload.work.bytes)
    buffers = [[torch.randn(length, device=place.device) for _ in range(count)] for _ in range(copies)]
    start = [s.clone() for s in buffers[0]]

    def fresh() -> Vectors:
        return [s.clone() for s in start]

    def truth() -> list[Tensor]:
        wide = [s.double() for s in start]
        return [s.sign() * (s.abs() - KAPPA).clamp_min(0.0) for s in wide]

    peers = dict.fromkeys(registry.PEERS["soft_threshold"], foreach)
    return Case.of(
        workload,
        providers=list(
            _providers(workload, place, soft_threshold, FE.soft_threshold_, peers, buffers, fresh, "in place")
        ),
        truth=truth,
        tolerance=1e-6,
    )


def build(workload: Workload, place: Place) -> Case:
    """One case: ours, and the peers."""
    return (_build_merge if workload.op == "merge" else _build_threshold)(workload, place)
