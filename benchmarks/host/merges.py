# SPDX-License-Identifier: Apache-2.0
"""Folding the adapters of a whole model into its weights, in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..case import Run
from ..merge import MERGED, MERGES, SCALE, Layers, fused
from .case import Caller, HostCase
from .place import HostPlace

MATRICES, WIDTH, RANK = 48, 32, 16


def build(dtype: torch.dtype, place: HostPlace) -> HostCase:
    """One case: the dtype of the weights; adapters are fp32."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=place.device)

    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        return normal(WIDTH, WIDTH).to(dtype), normal(RANK, WIDTH), normal(WIDTH, RANK)

    start: Layers = [drawn() for _ in range(MATRICES)]

    def fresh() -> Layers:
        return [(w.clone(), a, b) for w, a, b in start]

    def runs(method: Callable[[Layers], Sequence[Tensor]]) -> tuple[Run, Run]:
        layers = fresh()
        return lambda: method(layers), lambda: method(fresh())

    callers = []
    for entry in place.entries():
        run, check = runs(fused)
        callers.append(
            Caller(
                entry.name, lambda run=run: run, entry.role, entry.backend, using=entry.using, check=check,
                results=entry.results,
            )
        )  # fmt: skip
    for name, method in MERGES.items():
        run, check = runs(method)
        callers.append(Caller(name, lambda run=run: run, check=check))
    name = str(dtype).removeprefix("torch.")
    return HostCase(
        "merge", {"matrices": MATRICES, "d_in": WIDTH, "d_out": WIDTH, "rank": RANK}, name, callers,
        lambda: [w.double() + SCALE * (b.double() @ a.double()) for w, a, b in start], MERGED[name],
    )  # fmt: skip


def cases(place: HostPlace) -> Iterator[Callable[[], HostCase]]:
    """All cases, not built yet."""
    for dtype in (torch.float32, torch.bfloat16):
        yield functools.partial(build, dtype, place)
