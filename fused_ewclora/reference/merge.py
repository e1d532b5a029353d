# SPDX-License-Identifier: Apache-2.0
"""Folding adapters into weights, and soft thresholding, in plain PyTorch (docs/mathematics.md, sections 4 and
6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments


def merge_(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
) -> None:
    """W_i <- W_i + B_i diag(s_i) A_i in place, one after the other, each summed in fp32 (fp64 for fp64
    weights) and rounded once."""
    arguments.merge(weights, lora_as, lora_bs, scales, scale_factors)
    for weight, a, b, scale, factor in zip(weights, lora_as, lora_bs, scales, scale_factors, strict=True):
        acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
        s = factor if scale is None else scale.to(acc) * factor
        weight.copy_(weight.to(acc) + (b.to(acc) * s) @ a.to(acc))


def soft_threshold_(scales: Sequence[Tensor], kappa: float) -> None:
    """s_i <- sign(s_i) max(|s_i| - kappa, 0) in place; in fp32, so that kappa is not rounded to bf16."""
    arguments.soft_threshold(scales)
    for scale in scales:
        s = scale.to(torch.float64 if scale.dtype == torch.float64 else torch.float32)
        scale.copy_(s.sign() * (s.abs() - kappa).clamp(min=0))
