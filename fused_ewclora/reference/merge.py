"""Folding an adapter into a weight, and soft thresholding, in plain PyTorch (docs/mathematics.md, sections 4
and 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor | None, factor: float) -> None:
    """W <- W + B diag(s) A in place, summed in fp32 (fp64 for fp64 weights) and rounded once."""
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    s = factor if scale is None else scale.to(acc) * factor
    weight.copy_(weight.to(acc) + (lora_b.to(acc) * s) @ lora_a.to(acc))


def soft_threshold_(scale: Tensor, kappa: float) -> None:
    """s <- sign(s) max(|s| - kappa, 0) in place; in fp32, so that kappa is not rounded to bf16 first."""
    s = scale.to(torch.float64 if scale.dtype == torch.float64 else torch.float32)
    scale.copy_(s.sign() * (s.abs() - kappa).clamp(min=0))
