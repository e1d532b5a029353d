"""Merging adapters into weights, one layer and all of a model, and the soft threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fused_ewclora import functional as FE

from ..case import OURS, Case, Provider
from ..shapes import Model, Sizes
from .plan import BACKEND, CUDA, Place, Planned, cuda_is_built, turns

SCALE = 1e-3  # W stays near where it started, however often a run is repeated
KAPPA = 1e-6
THRESHOLDED = 1 << 16  # scales in the large case of the soft threshold
Layers = list[tuple[Tensor, Tensor, Tensor]]  # W, A, B
MERGED = {"float32": 1e-6, "bfloat16": 4e-3}  # relative error: roundings of W


def fused(layers: Layers, backend: str = BACKEND) -> list[Tensor]:
    """This library, all layers in one call."""
    weights, lora_as, lora_bs = (list(group) for group in zip(*layers, strict=True))
    return list(FE.merge_(weights, lora_as, lora_bs, SCALE, backend=backend))


def in_low_precision(layers: Layers) -> list[Tensor]:
    """BLAS adds the product to W, in its dtype."""
    return [w.addmm_(b.to(w.dtype), a.to(w.dtype), alpha=SCALE) for w, a, b in layers]


def in_fp32(layers: Layers) -> list[Tensor]:
    """An explicit fp32 sum, rounded once."""
    return [w.copy_(w.float() + SCALE * (b @ a)) for w, a, b in layers]


def of_copies(merge: Callable[[Layers], list[Tensor]], layers: Layers) -> Callable[[], list[Tensor]]:
    return lambda: merge([(w.clone(), a, b) for w, a, b in layers])


def build_merge(planned: Planned, place: Place) -> Case:
    d, rank, count = (int(planned.shape[name]) for name in ("width", "rank", "matrices"))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[planned.dtype]

    def draw() -> Layers:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=place.device)

        return [(normal(d, d).to(dtype), normal(rank, d), normal(d, rank)) for _ in range(count)]

    moved = 2.0 * count * d * d * dtype.itemsize
    buffers = [draw() for _ in range(place.copies(moved))]
    start = [(w.clone(), a, b) for w, a, b in buffers[0]]

    def provider(
        name: str, merge: Callable[[Layers], list[Tensor]], role: str = "peer", backend: str = ""
    ) -> Provider:
        runs = turns(lambda one: lambda: merge(one), buffers)
        ours = {"backend": backend, "algorithm": "one pass over W"} if backend else {}
        return Provider(name, role=role, check=of_copies(merge, start), **runs, **ours)

    of_cuda = functools.partial(fused, backend="cuda")
    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype,
        flops=2.0 * rank * count * d * d, bytes=moved,
        providers=[
            provider(OURS, fused, "ours", BACKEND),
            *([provider(CUDA, of_cuda, "variant", "cuda")] if cuda_is_built() else []),
            provider("addmm_ in the dtype of W", in_low_precision),
            provider("product and sum in fp32", in_fp32),
        ],
        truth=lambda: [w.double() + SCALE * (b.double() @ a.double()) for w, a, b in start],
        tolerance=MERGED[planned.dtype], product="tf32", floor_bytes=moved,
    )  # fmt: skip


def threshold(scales: Sequence[Tensor], backend: str = BACKEND) -> Sequence[Tensor]:
    """This library, all vectors in one call."""
    return FE.soft_threshold_(list(scales), KAPPA, backend=backend)


def foreach(scales: Sequence[Tensor]) -> Sequence[Tensor]:
    """All vectors by PyTorch's multi-tensor kernels: sign(s) max(|s| - kappa, 0)."""
    shrunk = torch._foreach_abs(scales)
    torch._foreach_sub_(shrunk, KAPPA)
    torch._foreach_clamp_min_(shrunk, 0.0)
    torch._foreach_mul_(shrunk, torch._foreach_sign(scales))
    torch._foreach_copy_(scales, shrunk)
    return scales


def build_threshold(planned: Planned, place: Place) -> Case:
    count, length = int(planned.shape["vectors"]), int(planned.shape["length"])
    moved = 8.0 * count * length
    buffers = [[torch.randn(length, device=place.device) for _ in range(count)] for _ in range(2)]
    start = [s.clone() for s in buffers[0]]

    def provider(
        name: str, method: Callable[[Sequence[Tensor]], Sequence[Tensor]], role: str, backend: str = ""
    ) -> Provider:
        runs = turns(lambda one: lambda: method(one), buffers)
        ours = {"backend": backend, "algorithm": "in place"} if backend else {}
        return Provider(name, role=role, check=lambda: method([s.clone() for s in start]), **runs, **ours)

    def truth() -> list[Tensor]:
        wide = [s.double() for s in start]
        return [s.sign() * (s.abs() - KAPPA).clamp_min(0.0) for s in wide]

    of_cuda = functools.partial(threshold, backend="cuda")
    return Case(
        op=planned.op, shape=planned.shape, dtype=planned.dtype, flops=3.0 * count * length, bytes=moved,
        providers=[
            provider(OURS, threshold, "ours", BACKEND),
            *([provider(CUDA, of_cuda, "variant", "cuda")] if cuda_is_built() else []),
            provider("foreach", foreach, "peer"),
        ],
        truth=truth, tolerance=1e-6,
    )  # fmt: skip


def _merge(model: Model, count: int, rank: int, dtype: str) -> Planned:
    shape: dict[str, int | str] = {
        "model": model.name, "matrices": count, "width": model.width, "rank": rank,
    }  # fmt: skip
    return Planned("merge", shape, dtype, build_merge)


def plan(sizes: Sizes) -> Iterator[Planned]:
    """One layer, then k and v of a whole model; then the scales of all adapters, and many."""
    for dtype in MERGED:
        for count in (1, 2 * sizes.large.depth):
            yield _merge(sizes.large, count, sizes.slice_rank, dtype)
    for count in (1, 2 * sizes.small.depth):
        yield _merge(sizes.small, count, sizes.slice_rank, "float32")
    few = {"vectors": 2 * sizes.large.depth, "length": sizes.rank}
    many = {"vectors": 1, "length": THRESHOLDED}
    for shape in (few, many):
        yield Planned("soft_threshold", dict(shape), "float32", functools.partial(build_threshold))
