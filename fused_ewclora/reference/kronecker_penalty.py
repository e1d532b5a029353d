# SPDX-License-Identifier: Apache-2.0
"""The penalties of Fishers that are a product of one factor of the outputs and one of the inputs, in plain
PyTorch (docs/mathematics.md, section 10).

With S = diag(s), M = B^T G B and N = A C A^T, P = (lambda/2) sum_kl s_k s_l M_kl N_kl. Factored: G = diag(r),
C = diag(c) / sum(c), which is F = r c^T / sum(c). Kronecker: G and C are matrices. Nothing is as large as F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .ewc_penalty import Scale, accumulate_dtype


def of_outputs(factor: Tensor, b: Tensor) -> Tensor:
    """G B `[d_out, r]`, of the diagonal or the matrix G."""
    wide = factor.to(b.dtype)
    return wide.unsqueeze(1) * b if factor.dim() == 1 else wide @ b


def of_inputs(factor: Tensor, a: Tensor) -> Tensor:
    """A C `[r, d_in]`, of c, whose sum divides, or of the matrix C."""
    wide = factor.to(a.dtype)
    if factor.dim() == 2:
        return a @ wide
    total = wide.sum()
    return a * torch.where(total <= 0.0, torch.zeros_like(wide), wide / total)  # NaN stays


def penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    ewc_lambda: float = 1.0,
) -> Tensor:
    """The differentiable truth of the ops `factored_penalty` and `kronecker_penalty`: fishers are the factors
    of the outputs of all adapters, then those of the inputs."""
    acc = accumulate_dtype([*lora_as, *lora_bs])
    count = len(lora_as)
    total = torch.zeros((), dtype=torch.float64, device=fishers[0].device)
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        a, b = lora_a.to(acc), lora_b.to(acc) * (1.0 if scales is None else scales[i])
        products = (b.T @ of_outputs(fishers[i], b)) * (of_inputs(fishers[count + i], a) @ a.T)
        total = total + products.sum(dtype=torch.float64)
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
    """The ops `factored_penalty` and `kronecker_penalty`; results as of `ewc_penalty.penalty_and_grads`."""
    arguments.kronecker_penalty(fishers, lora_as, lora_bs, scales, scale_factors, needs)
    acc = accumulate_dtype([*lora_as, *lora_bs])
    count = len(lora_as)
    total = torch.zeros((), dtype=torch.float64, device=fishers[0].device)
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    dss: list[Tensor] = []
    for i in range(count):
        scale, factor = scales[i], scale_factors[i]
        a, b = lora_as[i].to(acc), lora_bs[i].to(acc)
        s = b.new_full(b.shape[1:], factor) if scale is None else (scale.to(acc) * factor).expand(b.shape[1])
        g_b, a_c = of_outputs(fishers[i], b), of_inputs(fishers[count + i], a)
        m, n = b.T @ g_b, a_c @ a.T
        joint = m * n
        total += 0.5 * ewc_lambda * (joint * (s.unsqueeze(1) * s)).sum(dtype=torch.float64)
        if needs[0]:
            das.append(((s.unsqueeze(1) * m * s) @ a_c) * ewc_lambda)
        if needs[1]:
            dbs.append((g_b @ (s.unsqueeze(1) * n * s)) * ewc_lambda)
        if needs[2] and scale is not None:
            ds = (joint @ s) * (ewc_lambda * factor)
            dss.append(ds.sum() if scale.dim() == 0 else ds)
    grads = [g.reshape(-1) for g in (*das, *dbs, *dss)]
    flat = torch.cat(grads) if grads else total.new_empty(0, dtype=acc)
    return total.to(acc), flat
