# SPDX-License-Identifier: Apache-2.0
"""The ops as differentiable PyTorch, in the arguments of `ops.schemas`: what runs where a kernel could not be
followed. All derivatives of these are right, of any order, forward and reverse, under `torch.func` too.

`lora_linear` and the penalties stand for calls inside a transform or a trace, the `_backward`s for a
backward of which a graph is made (`create_graph=True`) or whose gradients are batched or dual. csrc/autograd
calls them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ewc_penalty as _penalty
from . import kronecker_penalty as _kronecker
from . import l1_penalty as _l1
from . import lora_linear as _linear
from .adapters import by_kind, ranges_of
from .philox import dropout


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`dropout` of x `[..., d]`, whose rows are counted over all leading dimensions."""
    if dropout_p == 0.0:
        return x
    return dropout(x.reshape(-1, x.shape[-1]), dropout_p, seed).reshape(x.shape)


def _times(z: Tensor, scale: Tensor | None, factor: float) -> Tensor:
    return z * (factor if scale is None else scale.to(z.dtype) * factor)


def lora_linear(
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
) -> Tensor:
    """y `[..., d_out]` of x `[..., d_in]`, in the dtype of x; sums are fp32 (fp64 for fp64)."""
    acc = _linear.accumulate_dtype(x.dtype)
    wide = x.to(acc)
    y = F.linear(wide, weight.to(acc), None if bias is None else bias.to(acc))
    branch = _dropped(wide, dropout_p, seed)
    pieces: list[tuple[int, int, Tensor]] = []
    for i, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        z = _times(F.linear(branch, lora_a.to(acc)), scales[i], scale_factors[i])
        ranges = ranges_of(rows, i)
        parts = F.linear(z, lora_b.to(acc)).split([stop - start for start, stop in ranges], dim=-1)
        pieces += [(start, stop, part) for (start, stop), part in zip(ranges, parts, strict=True)]
    return _added(y, pieces, weight.shape[0]).to(x.dtype)


def _added(y: Tensor, pieces: list[tuple[int, int, Tensor]], d_out: int) -> Tensor:
    """y with each (start, stop, part) added to its columns; nothing is written in place."""
    if len(pieces) == 1 and pieces[0][:2] == (0, d_out):
        return y + pieces[0][2]
    parts, done = [], 0
    for start, stop, part in sorted(pieces, key=lambda piece: piece[0]):
        parts += [y[..., done:start], y[..., start:stop] + part]
        done = stop
    return torch.cat([*parts, y[..., done:]], dim=-1)


def lora_linear_backward(
    dy: Tensor,
    dz: Tensor | None,
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
    """As `lora_linear.backward`, connected to the graphs of all arguments.

    z is computed again from x where x was kept. Where it was not, every A is a constant, and z has a graph if
    x does; dz is the gradient that comes back through it.
    """
    _, need_bs, need_scales = by_kind(needs[3:])
    if x is not None and (any(need_bs) or any(need_scales)):
        acc = _linear.accumulate_dtype(x.dtype)
        branch = dropout(x.reshape(-1, x.shape[-1]).to(acc), dropout_p, seed)
        z = branch @ torch.cat([a.to(acc) for a in lora_as]).T
    grads = _linear.backward(
        dy, x, weight, bias, z, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed, needs
    )
    if dz is not None and needs[0]:
        through_z = dropout(dz @ torch.cat([a.to(dz.dtype) for a in lora_as]), dropout_p, seed)
        grads[0] = grads[0] + through_z.to(dy.dtype).reshape(grads[0].shape)
    return grads


def _scales(
    scales: Sequence[Tensor | None], scale_factors: Sequence[float], dtype: torch.dtype
) -> list[float | Tensor]:
    together = zip(scales, scale_factors, strict=True)
    return [factor if scale is None else scale.to(dtype) * factor for scale, factor in together]


def ewc_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
) -> Tensor:
    """P, 0-d, in the accumulation dtype."""
    products = _scales(scales, scale_factors, _penalty.accumulate_dtype([*lora_as, *lora_bs]))
    return _penalty.ewc_penalty(fishers, lora_as, lora_bs, products, ewc_lambda)


def kronecker_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
) -> Tensor:
    """P of the ops `factored_penalty` and `kronecker_penalty`."""
    products = _scales(scales, scale_factors, _penalty.accumulate_dtype([*lora_as, *lora_bs]))
    return _kronecker.penalty(fishers, lora_as, lora_bs, products, ewc_lambda)


def l1_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    l1_lambda: float,
) -> Tensor:
    """P of the op `l1_penalty`, which has no Fishers."""
    products = _scales(scales, scale_factors, _penalty.accumulate_dtype([*lora_as, *lora_bs]))
    return _l1.penalty(lora_as, lora_bs, products, l1_lambda)


def ewc_penalty_backward(grad: Tensor, *operands: Any) -> list[Tensor]:
    """grad times the gradients of the kinds that `needs` = (dA, dB, ds), the last operand, asks for, every
    dA, every dB, every ds, in the shapes and dtypes of their inputs and connected to the graphs of all
    arguments."""
    return _penalty_backward(_penalty.penalty_and_grads, grad, *operands)


def kronecker_penalty_backward(grad: Tensor, *operands: Any) -> list[Tensor]:
    """The same for the ops `factored_penalty` and `kronecker_penalty`."""
    return _penalty_backward(_kronecker.penalty_and_grads, grad, *operands)


def l1_penalty_backward(grad: Tensor, *operands: Any) -> list[Tensor]:
    """The same for the op `l1_penalty`; the derivative of a sign is 0."""
    return _penalty_backward(_l1.penalty_and_grads, grad, *operands)


def _penalty_backward(
    penalty_and_grads: Callable[..., tuple[Tensor, Tensor]],
    grad: Tensor,
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    of_kinds = zip((lora_as, lora_bs, scales), needs, strict=True)
    wanted = [t for of_kind, need in of_kinds if need for t in of_kind if t is not None]
    if not wanted:
        return []
    _, flat = penalty_and_grads(fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs)
    parts = (flat * grad).split([t.numel() for t in wanted])
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, wanted, strict=True)]
