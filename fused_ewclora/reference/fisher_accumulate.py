# SPDX-License-Identifier: Apache-2.0
"""Squared-gradient Fisher accumulation in plain PyTorch, one sample at a time (docs/mathematics.md,
section 3)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import arguments
from .adapters import as_rows


def sample_bounds(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Row offsets of the samples after flattening x to `[rows, d_in]`: N + 1 numbers."""
    if cu_seqlens is not None:
        return [int(offset) for offset in cu_seqlens.tolist()]
    samples, tokens = x.shape[0], math.prod(x.shape[1:-1])
    return [n * tokens for n in range(samples + 1)]


def fisher_accumulate_(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    squares: str = "sample",
    weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """F += weight * sum_n (dy_n^T x_n)^2 (squares "sample") or F += weight * (sum_n dy_n^T x_n)^2 (squares
    "batch"), in place."""
    arguments.fisher_accumulate(fisher, x, dy, squares, cu_seqlens)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    x2, dy2 = as_rows(x), as_rows(dy)
    bounds = sample_bounds(x, cu_seqlens) if squares == "sample" else [0, x2.shape[0]]
    total = torch.zeros(fisher.shape, dtype=acc, device=fisher.device)
    for start, stop in itertools.pairwise(bounds):
        total += (dy2[start:stop].to(acc).T @ x2[start:stop].to(acc)).square()
    return fisher.copy_(fisher.to(acc) + weight * total)
