# SPDX-License-Identifier: Apache-2.0
"""How far the factors of different tasks are apart, for reports; nothing is as large as a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tasks = Sequence[tuple[Tensor, Tensor]]  # (A, B) of every task
BLOCK_BYTES = 2**21  # of fp32 elements of all B A together


@torch.no_grad()
def overlaps(tasks: Tasks) -> tuple[float, ...]:
    """For each task the share of the squared length of A inside of the span of the A of earlier tasks."""
    found, basis = [], None
    for lora_a, _ in tasks:
        wide = lora_a.double()
        inside = wide @ basis.T if basis is not None else wide[:, :0]
        length = float(wide.square().sum())
        found.append(float(inside.square().sum()) / length if length else 0.0)
        own = wide if basis is None else torch.cat([basis, wide])
        _, values, rows = torch.linalg.svd(own, full_matrices=False)
        basis = rows[values > values.max() * max(own.shape) * torch.finfo(own.dtype).eps]
    return tuple(found)


@torch.no_grad()
def collisions(tasks: Tasks, threshold: float) -> Tensor:
    """`[T, T]`, the share of the elements that are not 0 both in B A of task i and in that of task j, on the
    diagonal in that of one task; at most `threshold` times the largest of its B A counts as 0."""
    if not tasks:
        return torch.zeros(0, 0, dtype=torch.float64)
    limits = [threshold * _largest(lora_a, lora_b) for lora_a, lora_b in tasks]
    columns, rows = tasks[0][0].shape[1], tasks[0][1].shape[0]
    counts = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for start in range(0, rows, _block(columns, len(tasks))):
        part = slice(start, start + _block(columns, len(tasks)))
        there = torch.stack(
            [
                ((lora_b[part] @ lora_a).abs() > limit).flatten().float()
                for (lora_a, lora_b), limit in zip(tasks, limits, strict=True)
            ]
        )
        counts += (there @ there.T).double().cpu()  # whole numbers below 2^24, exact in fp32
    return counts / max(rows * columns, 1)


def _block(columns: int, tasks: int) -> int:
    return max(BLOCK_BYTES // (4 * columns * tasks), 1)


def _largest(lora_a: Tensor, lora_b: Tensor) -> float:
    rows = _block(lora_a.shape[1], 1)
    return max((float((part @ lora_a).abs().max()) for part in lora_b.split(rows)), default=0.0)
