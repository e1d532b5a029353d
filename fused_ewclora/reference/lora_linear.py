# SPDX-License-Identifier: Apache-2.0
"""LoRA linear in plain PyTorch: y = x W^T + bias + ((x A^T) * s) B^T, and its backward (the formulas of
docs/mathematics.md, section 1).

`lora_linear` and `lora_linear_slices` are the differentiable truth. `forward` and `backward` carry the
signature of the ops `fused_ewclora::lora_linear` and `fused_ewclora::lora_linear_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .adapters import as_rows, by_kind, ranges_of
from .philox import dropout

Scale = float | Tensor
Slice = tuple[int, int, Tensor, Tensor, Scale]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Scale = 1.0,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The differentiable truth of `functional.lora_linear`."""
    slices = [(0, weight.shape[0], lora_a, lora_b, scale)]
    return lora_linear_slices(x, weight, bias, slices, dropout_p=dropout_p, training=training, seed=seed)


def lora_linear_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slices: Sequence[Slice],
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The differentiable truth of `functional.lora_linear_slices`."""
    acc = accumulate_dtype(x.dtype)
    x2 = as_rows(x).to(acc)
    branch = dropout(x2, dropout_p if training else 0.0, seed)
    y = x2 @ weight.to(acc).T
    if bias is not None:
        y = y + bias.to(acc)
    parts, done = [], 0
    for start, stop, lora_a, lora_b, scale in sorted(slices, key=lambda item: item[0]):
        low_rank = ((branch @ lora_a.to(acc).T) * scale) @ lora_b.to(acc).T  # [M, stop - start]
        parts += [y[:, done:start], y[:, start:stop] + low_rank]
        done = stop
    y = torch.cat([*parts, y[:, done:]], dim=1)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _scale(tensor: Tensor | None, factor: float, acc: torch.dtype) -> Scale:
    return factor if tensor is None else tensor.to(acc) * factor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns y `[..., d_out]` and z `[M, sum of ranks]` in the accumulation dtype."""
    arguments.lora_linear(x, weight, bias, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed)
    acc = accumulate_dtype(x.dtype)
    x2 = as_rows(x).to(acc)
    z = dropout(x2, dropout_p, seed) @ torch.cat([a.to(acc) for a in lora_as]).T
    # Not a view of what is computed: autograd lets no view that a Function returns be changed in place.
    output = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=acc)
    y = output.view(x2.shape[0], weight.shape[0])
    torch.mm(x2, weight.to(acc).T, out=y)
    if bias is not None:
        y += bias.to(acc)
    for i, z_i in enumerate(z.split([a.shape[0] for a in lora_as], dim=1)):
        low_rank = (z_i * _scale(scales[i], scale_factors[i], acc)) @ lora_bs[i].to(acc).T
        done = 0
        for start, stop in ranges_of(rows, i):
            y[:, start:stop] += low_rank[:, done : done + stop - start]
            done += stop - start
    return output.to(x.dtype), z


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients asked for by `needs` = (x, weight, bias, then every A, every B, every s), in that order, each
    in its input's dtype.

    x is needed for dA and dweight, z for dB and ds.
    """
    arguments.lora_linear_backward(
        dy, x, weight, bias, z, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed, needs
    )
    acc = accumulate_dtype(dy.dtype)
    g = as_rows(dy).to(acc)
    x2 = None if x is None else as_rows(x).to(acc)
    branch = None if x2 is None else dropout(x2, dropout_p, seed)
    dx_branch = g.new_zeros(g.shape[0], weight.shape[1]) if needs[0] else None
    need_as, need_bs, need_scales = by_kind(needs[3:])
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    dss: list[Tensor] = []
    first = 0
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        scale, rank = _scale(scales[i], scale_factors[i], acc), lora_a.shape[0]
        g_i = torch.cat([g[:, start:stop] for start, stop in ranges_of(rows, i)], dim=1)
        p = g_i @ lora_b.to(acc)  # [M, r]
        z_i = None if z is None else z[:, first : first + rank]
        first += rank
        if dx_branch is not None:
            dx_branch += (p * scale) @ lora_a.to(acc)
        if need_as[i]:
            assert branch is not None
            das.append(((p * scale).T @ branch).to(lora_a.dtype))
        if need_bs[i]:
            assert z_i is not None
            dbs.append((g_i.T @ (z_i * scale)).to(lora_b.dtype))
        if need_scales[i]:
            learned = scales[i]
            assert z_i is not None and learned is not None
            ds = (p * z_i).sum(0) * scale_factors[i]
            dss.append((ds.sum() if learned.dim() == 0 else ds).to(learned.dtype))
    grads: list[Tensor] = []
    if dx_branch is not None:
        dx = g @ weight.to(acc) + dropout(dx_branch, dropout_p, seed)
        grads.append(dx.to(dy.dtype).reshape(*dy.shape[:-1], weight.shape[1]))
    if needs[1]:
        assert x2 is not None
        grads.append((g.T @ x2).to(weight.dtype))
    if needs[2]:
        assert bias is not None
        grads.append(g.sum(0).to(bias.dtype))
    return [*grads, *das, *dbs, *dss]
