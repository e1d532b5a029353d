# SPDX-License-Identifier: Apache-2.0
"""EWC penalty on the product in plain PyTorch: P = (lambda/2) sum F * (B diag(s) A)^2 (docs/mathematics.md,
section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .eight_bit import decode

Scale = float | Tensor


def accumulate_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """fp32, or fp64 when every tensor is fp64."""
    return torch.float64 if tensors and all(t.dtype == torch.float64 for t in tensors) else torch.float32


def values(fisher: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """F `[d_out, columns]` in `dtype`; codes are decoded."""
    return decode(fisher, columns, dtype) if fisher.dtype == torch.uint8 else fisher.to(dtype)


def ewc_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    ewc_lambda: float = 1.0,
) -> Tensor:
    """The differentiable truth of `functional.ewc_penalty`."""
    acc = accumulate_dtype([*lora_as, *lora_bs])
    total = torch.zeros((), dtype=torch.float64, device=fishers[0].device if fishers else None)
    for i, (fisher, a, b) in enumerate(zip(fishers, lora_as, lora_bs, strict=True)):
        delta = (b.to(acc) * (1.0 if scales is None else scales[i])) @ a.to(acc)  # [d_out, d_in]
        total = total + (values(fisher, a.shape[1], acc) * delta.square()).sum(dtype=torch.float64)
    return (0.5 * ewc_lambda * total).to(acc)


def penalty_and_grads(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The op `fused_ewclora::ewc_penalty`: penalty and, as `needs` = (dA, dB, ds) asks, gradients in the
    accumulation dtype, one after the other in one flat tensor: every dA, every dB, every ds.

    ds is returned for the adapters whose scale is a tensor.
    """
    arguments.ewc_penalty(fishers, lora_as, lora_bs, scales, scale_factors, needs)
    acc = accumulate_dtype([*lora_as, *lora_bs])
    total = torch.zeros((), dtype=torch.float64, device=fishers[0].device)
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    dss: list[Tensor] = []
    adapters = zip(fishers, lora_as, lora_bs, scales, scale_factors, strict=True)
    for fisher, lora_a, lora_b, scale, factor in adapters:
        s = factor if scale is None else scale.to(acc) * factor
        a, b = lora_a.to(acc), lora_b.to(acc)
        delta = (b * s) @ a
        h = values(fisher, a.shape[1], acc) * delta
        total += 0.5 * ewc_lambda * (h * delta).sum(dtype=torch.float64)
        h *= ewc_lambda  # not to F before: Inf times a delta of zero would be NaN
        h_a = h @ a.T  # [d_out, r]
        if needs[0]:
            das.append((b * s).T @ h)
        if needs[1]:
            dbs.append(h_a * s)
        if needs[2] and scale is not None:
            ds = (b * h_a).sum(0) * factor
            dss.append(ds.sum() if scale.dim() == 0 else ds)
    grads = [g.reshape(-1) for g in (*das, *dbs, *dss)]
    flat = torch.cat(grads) if grads else total.new_empty(0, dtype=acc)
    return total.to(acc), flat
