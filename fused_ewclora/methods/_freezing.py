# SPDX-License-Identifier: Apache-2.0
"""How the current direction of SD-LoRA becomes one of the past ones, or is dropped, when a task ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ._directions import Directions, grams, inverse_norm


@dataclass(frozen=True)
class Frozen:
    """The directions after a task, and how far the new one is from the span of the earlier ones."""

    directions: Directions  # lora_A and lora_B as they were
    residual: float  # share of its squared norm outside of that span; 0 for a direction that is zero
    kept: bool  # as a direction of its own


@dataclass(frozen=True)
class Measured:
    """The current direction of an adapter as it ends its task, in fp64."""

    norm: float  # n, by the normalisation of the method; 0 for a direction that is zero
    divided: bool  # by n, in the forward pass of the task
    inner: Tensor  # [R + r, R + r], inner products of all rank-1 parts


@torch.no_grad()
def measure(now: Directions, normalization: str) -> Measured:
    """Raises `ArgumentError` when the direction or a magnitude is not finite."""
    lora_a = torch.cat([now.lora_past_A, now.lora_A]).double()
    lora_b = torch.cat([now.lora_past_B, now.lora_B], dim=1).double()
    gram_a, gram_b = grams(lora_a, lora_b)
    inner = gram_a * gram_b  # fp64 because the residual is a small difference
    current = slice(now.lora_past_A.shape[0], None)
    square = inner[current, current].sum()
    traces = gram_a[current, current].trace() * gram_b[current, current].trace()
    if not bool(torch.isfinite(square) & torch.isfinite(now.lora_magnitudes).all()):
        raise ArgumentError("expected a finite direction B A and finite magnitudes, got NaN or Inf")
    norm_of_product, product_of_norms = float(square.clamp(min=0.0).sqrt()), float(traces.sqrt())
    # Below `tiny` 1 / n would overflow.
    smallest = max(torch.finfo(torch.float64).eps * product_of_norms, torch.finfo(now.lora_A.dtype).tiny)
    if norm_of_product <= smallest:
        return Measured(0.0, False, inner)
    if normalization == "factors":
        return Measured(product_of_norms, False, inner)
    return Measured(norm_of_product, float(inverse_norm(now.lora_A, now.lora_B)) != 1.0, inner)


@torch.no_grad()
def freeze(now: Directions, measured: Measured, threshold: float | None, alpha_init: float) -> Frozen:
    """The current direction joins the past ones, or is dropped when it is zero or its residual is at most
    `threshold`: then its coefficients are folded into their magnitudes."""
    if measured.norm == 0.0:
        return Frozen(_dropped(now, torch.zeros_like(now.lora_anchor), alpha_init), 0.0, False)
    alpha = now.lora_magnitudes[-1]
    if not measured.divided:
        alpha = alpha * measured.norm  # what it added stays the same
    scale = _scale(now, 1 / measured.norm)
    coefficients, residual = nearest((scale.T @ measured.inner @ scale).cpu())
    if threshold is not None and residual <= threshold:
        return Frozen(_dropped(now, alpha * coefficients.to(alpha.device), alpha_init), residual, False)
    return Frozen(_joined(now, scale, alpha, alpha_init), residual, True)


@torch.no_grad()
def freeze_shared(
    of_adapters: Sequence[Directions],
    measured: Sequence[Measured],
    threshold: float | None,
    alpha_init: float,
) -> list[Frozen]:
    """`freeze` of the one direction that all adapters of a network are together, as they have one magnitude:
    it is kept or dropped in all of them, by the residual of all of them.

    Every part is divided by what it was divided by in the forward pass, because a magnitude that is common
    cannot make up for a division by norms that differ; `normalised` divides later. Where a part is zero, the
    direction has no ranks.
    """
    columns = [0.0 if m.norm == 0.0 else 1 / m.norm if m.divided else 1.0 for m in measured]
    if not any(columns):
        zeros = [torch.zeros_like(now.lora_anchor) for now in of_adapters]
        pairs = zip(of_adapters, zeros, strict=True)
        return [Frozen(_dropped(now, zero, alpha_init), 0.0, False) for now, zero in pairs]
    scales = [_scale(now, column) for now, column in zip(of_adapters, columns, strict=True)]
    gram = sum((scale.T @ m.inner @ scale).cpu() for scale, m in zip(scales, measured, strict=True))
    coefficients, residual = nearest(cast(Tensor, gram))
    kept = threshold is None or residual > threshold
    frozen = []
    for now, scale, column in zip(of_adapters, scales, columns, strict=True):
        alpha = now.lora_magnitudes[-1]
        if not kept:
            directions = _dropped(now, alpha * coefficients.to(alpha.device), alpha_init)
        elif column:
            directions = _joined(now, scale, alpha, alpha_init)
        else:
            directions = _without_ranks(now, alpha, alpha_init)
        frozen.append(Frozen(directions, residual, kept))
    return frozen


@torch.no_grad()
def normalised(now: Directions) -> Directions:
    """Every past direction divided by ||B_k||_F ||A_k||_F. lora_anchor is still what was added when the last
    task ended: magnitudes are multiplied by what their directions are divided by."""
    if not now.lora_anchor.numel():
        return now
    squares_of_a, squares_of_b = now.lora_past_A.double().square(), now.lora_past_B.double().square()
    ranks = (now.lora_past_scale != 0).double()  # [R, D], of each direction
    norms = ((ranks.T @ squares_of_a.sum(1)) * (ranks.T @ squares_of_b.sum(0))).sqrt()
    before = now.lora_past_scale.double().sum(0) / ranks.sum(0).clamp(min=1.0)  # one value per direction
    scale = ranks / torch.where(norms > 0.0, norms, 1.0)
    anchor = now.lora_anchor.double() * torch.where(norms > 0.0, before * norms, 1.0)
    return replace(
        now,
        lora_past_scale=scale.to(now.lora_past_scale.dtype),
        lora_anchor=anchor.to(now.lora_anchor.dtype),
    )


def _scale(now: Directions, column: float) -> Tensor:
    """`lora_past_scale` with a column for the current direction, fp64."""
    past = now.lora_past_scale.double()
    return torch.block_diag(past, past.new_full((now.lora_A.shape[0], 1), column))


def _joined(now: Directions, scale: Tensor, alpha: Tensor, alpha_init: float) -> Directions:
    anchor = torch.cat([now.lora_magnitudes[:-1], alpha[None]])
    like = now.lora_magnitudes
    return Directions(
        now.lora_A,
        now.lora_B,
        torch.cat([anchor, like.new_full((1,), alpha_init)]),
        torch.cat([now.lora_past_A, now.lora_A]),
        torch.cat([now.lora_past_B, now.lora_B], dim=1),
        scale.to(like.dtype),
        anchor,
    )


def _without_ranks(now: Directions, alpha: Tensor, alpha_init: float) -> Directions:
    """With a past direction that is zero: it has a magnitude, which other adapters use."""
    anchor = torch.cat([now.lora_magnitudes[:-1], alpha[None]])
    return replace(
        now,
        lora_magnitudes=torch.cat([anchor, anchor.new_full((1,), alpha_init)]),
        lora_past_scale=nn.functional.pad(now.lora_past_scale, (0, 1)),
        lora_anchor=anchor,
    )


def _dropped(now: Directions, folded: Tensor, alpha_init: float) -> Directions:
    anchor = (now.lora_magnitudes[:-1] + folded).to(now.lora_magnitudes.dtype)
    magnitudes = torch.cat([anchor, anchor.new_full((1,), alpha_init)])
    return replace(now, lora_magnitudes=magnitudes, lora_anchor=anchor)


def nearest(gram: Tensor) -> tuple[Tensor, float]:
    """The least-squares coefficients of the last of some matrices over the others, and the share of its
    squared norm that they leave over, from the Gram matrix `[D + 1, D + 1]`, fp64.

        min_a ||D_t - sum_k a_k D_k||^2,   K a = b,   K_kl = <D_k, D_l>,  b_k = <D_k, D_t>
    """
    among, with_last, own = gram[:-1, :-1], gram[:-1, -1], gram[-1, -1]
    coefficients = torch.linalg.pinv(among, hermitian=True) @ with_last
    left = own - 2.0 * with_last @ coefficients + coefficients @ among @ coefficients
    return coefficients, max(float(left / own), 0.0)
