# SPDX-License-Identifier: Apache-2.0
"""Calls of the Fisher accumulation together with what they should add."""

from __future__ import annotations

from typing import Any, NamedTuple

import oracles
import torch
from tolerance import EPS, accumulation, assert_within, repeats, rounding_bound, sum_bound
from torch import Tensor

from fused_ewclora import functional as FE


class Case(NamedTuple):
    """One call; `samples` are the (x_n, dy_n) that it is about."""

    fisher: Tensor
    x: Tensor
    dy: Tensor
    samples: list[tuple[Tensor, Tensor]]
    mode: str = "sample"
    weight: float = 1.0
    cu_seqlens: Tensor | None = None

    def run(self, backend: str, **options: Any) -> Tensor:
        options = {"mode": self.mode, "weight": self.weight, "cu_seqlens": self.cu_seqlens, **options}
        return FE.fisher_accumulate_(self.fisher, self.x, self.dy, backend=backend, **options)


def per_sample(x: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(a.reshape(-1, x.shape[-1]), b.reshape(-1, dy.shape[-1])) for a, b in zip(x, dy, strict=True)]


def squared_sums(
    samples: list[tuple[Tensor, Tensor]],
    mode: str,
    shape: torch.Size,
    dtype: torch.dtype,
    backend: str,
    repeated: bool = False,
) -> Any:
    """The exact increment, and how far the square of a computed sum of T products, summed over N, may be off:
    |(g + e)^2 - g^2| <= 2 |g| e + e^2 with e the bound of one sum."""
    if mode == "batch" and samples:
        samples = [(torch.cat([x for x, _ in samples]), torch.cat([dy for _, dy in samples]))]
    exact, bound = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for x, dy in samples:
        g = oracles.exact(dy).T @ oracles.exact(x)
        magnitude = oracles.magnitude(dy).T @ oracles.magnitude(x)
        e = sum_bound(magnitude, x.shape[0], dtype, backend, repeated)
        exact, bound = exact + g.square(), bound + 2 * g.abs() * e + e.square()
    return exact, bound + sum_bound(exact, len(samples), dtype, backend, repeated)


def assert_accumulates(case: Case, backend: str, **options: Any) -> None:
    before = oracles.exact(case.fisher)
    dtype, kind = case.x.dtype, case.fisher.dtype
    repeated = repeats(case.x, case.dy)
    increment, bound = squared_sums(case.samples, case.mode, case.fisher.shape, dtype, backend, repeated)
    assert case.run(backend, **options) is case.fisher
    exact = before + case.weight * increment
    parts = before.abs() + abs(case.weight) * increment
    bound = abs(case.weight) * bound + 2 * EPS[accumulation(dtype)] * parts + rounding_bound(exact, kind)
    assert_within(case.fisher, exact, bound, f"fisher, mode {case.mode}")
