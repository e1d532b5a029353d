# SPDX-License-Identifier: Apache-2.0
"""y + x R^T + ((x A^T) * s) B^T in plain PyTorch, and its backward: what adapters add to a product that
somebody else has computed, and a residual R that has been merged beside it (docs/mathematics.md, section 1).

`add_low_rank` is the differentiable truth, of any order and under `torch.func`; `forward` and `backward` are
what the autograd node runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import as_rows, by_kind, ranges_of
from .philox import dropout


def wide_dtype(y: Tensor, x: Tensor, lora_as: Sequence[Tensor]) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 if any operand is fp64."""
    return (
        torch.float64 if torch.float64 in {y.dtype, x.dtype, *(a.dtype for a in lora_as)} else torch.float32
    )


def _times(z: Tensor, scale: Tensor | None, factor: float) -> Tensor:
    if scale is None:
        return z if factor == 1.0 else z * factor
    return z * (scale.to(z.dtype) * factor)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """y `[..., d_out]` with the products of x `[..., d_in]` added, in the dtype of y; `rows` as in the
    ops."""
    acc = wide_dtype(y, x, lora_as)
    x2, total = as_rows(x).to(acc), as_rows(y).to(acc)
    if residual is not None:
        total = total + F.linear(x2, residual.to(acc))
    branch = dropout(x2, dropout_p, seed)
    added: list[tuple[int, int, Tensor]] = []
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        z = _times(F.linear(branch, lora_a.to(acc)), scales[i], scale_factors[i])
        ranges = ranges_of(rows, i)
        parts = F.linear(z, lora_b.to(acc)).split([stop - start for start, stop in ranges], dim=1)
        added += [(start, stop, part) for (start, stop), part in zip(ranges, parts, strict=True)]
    columns, done = [], 0
    for start, stop, part in sorted(added, key=lambda piece: piece[0]):
        columns += [total[:, done:start], total[:, start:stop] + part]
        done = stop
    return torch.cat([*columns, total[:, done:]], dim=1).to(y.dtype).reshape(y.shape)


def forward(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The sum as a new tensor, and z `[M, r]` of every adapter in the dtype of sums."""
    acc = wide_dtype(y, x, lora_as)
    x2, total = as_rows(x).to(acc), as_rows(y).to(acc)
    owned = total.dtype != y.dtype
    if residual is not None:
        total, owned = torch.addmm(total, x2, residual.to(acc).T), True
    branch = dropout(x2, dropout_p, seed)
    zs = []
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        z = branch @ lora_a.to(acc).T
        zs.append(z)
        scaled, wide_b, first = _times(z, scales[i], scale_factors[i]), lora_b.to(acc), 0
        if not owned and ranges_of(rows, i) == [(0, total.shape[1])]:
            total, owned = torch.addmm(total, scaled, wide_b.T), True
            continue
        total, owned = total if owned else total.clone(), True
        for start, stop in ranges_of(rows, i):
            last = first + stop - start
            total[:, start:stop].addmm_(scaled, wide_b[first:last].T)
            first = last
    return (total if owned else total.clone()).to(y.dtype).reshape(y.shape), zs


def backward(
    dy: Tensor,
    x: Tensor,
    zs: Sequence[Tensor] | None,
    residual: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients asked for by `needs` = (x, then every A, every B, every s), in that order, each in the dtype
    of its input; that of y is dy. Without zs they are computed again, connected to the graphs of all
    arguments."""
    acc = wide_dtype(dy, x, lora_as)
    g, x2 = as_rows(dy).to(acc), as_rows(x).to(acc)
    need_as, need_bs, need_scales = by_kind(needs[1:])
    branch = dropout(x2, dropout_p, seed) if zs is None or any(need_as) else x2
    low: Tensor | None = None  # gradient of x after dropout
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    dss: list[Tensor] = []
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        ranges, wide_a = ranges_of(rows, i), lora_a.to(acc)
        parts = [g[:, start:stop] for start, stop in ranges]
        g_i = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        p = g_i @ lora_b.to(acc)  # [M, r]
        u = _times(p, scales[i], scale_factors[i])
        z = (branch @ wide_a.T) if zs is None else zs[i]
        if needs[0]:
            low = u @ wide_a if low is None else low + u @ wide_a
        if need_as[i]:
            das.append((u.T @ branch).to(lora_a.dtype))
        if need_bs[i]:
            # As the transpose of z^T g, with long contiguous rows; that product takes a CPU half the time.
            dbs.append((_times(z, scales[i], scale_factors[i]).T @ g_i).T.to(lora_b.dtype).contiguous())
        if need_scales[i]:
            learned = scales[i]
            assert learned is not None
            ds = (p * z).sum(0) * scale_factors[i]
            dss.append((ds.sum() if learned.dim() == 0 else ds).to(learned.dtype))
    grads: list[Tensor] = []
    if needs[0]:
        dx = g.new_zeros(x2.shape) if low is None else dropout(low, dropout_p, seed)
        if residual is not None:
            dx = dx + g @ residual.to(acc)
        grads.append(dx.to(x.dtype).reshape(x.shape))
    return [*grads, *das, *dbs, *dss]
