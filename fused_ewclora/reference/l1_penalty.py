# SPDX-License-Identifier: Apache-2.0
"""The l1 norm of what adapters add, P = lambda sum |B diag(s) A|, in plain PyTorch (docs/mathematics.md,
section 13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .ewc_penalty import Scale, accumulate_dtype

CPU_BLOCK, GPU_BLOCK = 2**19, 2**24  # bytes of B diag(s) A: what a cache holds, what keeps launches few


def penalty(
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    l1_lambda: float = 1.0,
) -> Tensor:
    """The differentiable truth of `functional.l1_penalty`."""
    acc = accumulate_dtype([*lora_as, *lora_bs])
    total = torch.zeros((), dtype=torch.float64, device=lora_as[0].device if lora_as else None)
    for i, (a, b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        delta = (b.to(acc) * (1.0 if scales is None else scales[i])) @ a.to(acc)  # [d_out, d_in]
        total = total + delta.abs().sum(dtype=torch.float64)
    return (l1_lambda * total).to(acc)


def penalty_and_grads(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    l1_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The op `fused_ewclora::l1_penalty` with whole matrices; fishers is empty, results as of
    `ewc_penalty.penalty_and_grads`."""
    return _all_adapters(fishers, lora_as, lora_bs, scales, scale_factors, l1_lambda, needs, in_blocks=False)


def penalty_and_grads_in_blocks(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    l1_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The same by blocks of rows, one after the other in a fixed order: nothing is as large as B A."""
    return _all_adapters(fishers, lora_as, lora_bs, scales, scale_factors, l1_lambda, needs, in_blocks=True)


def rows_of_block(a: Tensor) -> int:
    """How many rows of B A, in the dtype of A, fill a block; at least one."""
    size = CPU_BLOCK if a.device.type == "cpu" else GPU_BLOCK
    return max(size // max(a.shape[1] * a.element_size(), 1), 1)


def _all_adapters(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    l1_lambda: float,
    needs: Sequence[bool],
    in_blocks: bool,
) -> tuple[Tensor, Tensor]:
    arguments.l1_penalty(fishers, lora_as, lora_bs, scales, scale_factors, needs)
    acc = accumulate_dtype([*lora_as, *lora_bs])
    total = torch.zeros((), dtype=torch.float64, device=lora_as[0].device)
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    dss: list[Tensor] = []
    for lora_a, lora_b, scale, factor in zip(lora_as, lora_bs, scales, scale_factors, strict=True):
        a, b = lora_a.to(acc), lora_b.to(acc)
        s = b.new_full(b.shape[1:], factor) if scale is None else (scale.to(acc) * factor).expand(b.shape[1])
        rows = rows_of_block(a) if in_blocks else max(b.shape[0], 1)
        needs_h = needs[1] or (needs[2] and scale is not None)
        norm, da, h = _norm(a, b * s, rows, needs[0], needs_h)
        total += l1_lambda * norm
        if needs[0]:
            das.append(da * l1_lambda)
        if needs[1]:
            dbs.append((h * s) * l1_lambda)
        if needs[2] and scale is not None:
            ds = (b * h).sum(0) * (l1_lambda * factor)
            dss.append(ds.sum() if scale.dim() == 0 else ds)
    grads = [g.reshape(-1) for g in (*das, *dbs, *dss)]
    flat = torch.cat(grads) if grads else total.new_empty(0, dtype=acc)
    return total.to(acc), flat


def _norm(a: Tensor, b: Tensor, rows: int, needs_a: bool, needs_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """sum |B A| in fp64, its gradient B^T H with respect to A, and H A^T, where H = sign(B A), for so many
    rows at a time; what is not needed is 0."""
    norm = torch.zeros((), dtype=torch.float64, device=a.device)
    da = torch.zeros_like(a)
    products = []
    for part in b.split(rows):
        more, signs = _block(a, part)
        norm = norm + more
        if needs_a:
            da = da + part.T @ signs
        if needs_h:
            products.append(signs @ a.T)
        del signs  # before the next block is made
    return norm, da, torch.cat(products) if products else torch.zeros_like(b)


def _block(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    delta = b @ a
    return delta.abs().sum().double(), delta.sign()
