# SPDX-License-Identifier: Apache-2.0
"""LoRA linear on Triton: four ways to put the low-rank term into the base product (see `cost_model`).

Sums are fp32; z, u and the factors are rounded to the dtype of x where they enter a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference import lora_linear as reference
from ...reference.adapters import as_rows, by_kind
from .cost_model import MAX_FULL_RANK, padded
from .launch import addressable
from .lowrank import Dropout, Gradients, Packed, add_up, columns_pass, pack, product, rows_pass

# Elements of a row's parts of u that the product adds up, in each of its blocks of columns; more are added up
# by a launch before it.
PARTS_IN_PRODUCT = 128


def _matrix(tensor: Tensor) -> Tensor:
    """`[M, d]`, in place where offsets inside a tile fit in 32 bits."""
    return addressable(as_rows(tensor))


class _Forward:
    """The arguments of one call, and what every algorithm returns."""

    def __init__(
        self,
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
    ) -> None:
        self.x, self.weight = _matrix(x), addressable(weight)
        self.bias = None if bias is None else bias.contiguous()
        self.adapters = (lora_as, lora_bs, scales, scale_factors, rows)
        self.dropout = Dropout.of(dropout_p, seed)
        self.d_out, self.d_in = weight.shape
        self.rank = sum(a.shape[0] for a in lora_as)
        # What is returned is no view: autograd lets no view that a Function returns be changed in place.
        self.output = self.x.new_empty((*x.shape[:-1], self.d_out))
        self.y = self.output.view(self.x.shape[0], self.d_out)
        self.z = self.x.new_empty(self.x.shape[0], self.rank, dtype=torch.float32)
        self.again: tuple[Tensor, ...] = ()

    def pack(self, b: Tensor | None = None) -> Packed:
        packed = pack(*self.adapters, self.x, self.d_out, b=b)
        if b is None:
            self.again = (packed.a, packed.b)
        return packed

    def product(self, packed: Packed, full: bool = False, base: bool = True) -> None:
        factors, bounds = (packed.a, packed.b), (packed.lo, packed.hi)
        product(self.x, self.weight, factors, self.z, self.bias, self.y, bounds, full=full, base=base)


def _forward(algorithm: Callable[[_Forward], None]) -> Callable[..., tuple[Tensor, ...]]:
    """The host of the op by an algorithm that fills in y and z. What it returns besides, packed factors, the
    backward of the same call takes as `again`, and packs none."""

    @functools.wraps(algorithm)
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        x, weight = arguments[:2]
        if x.numel() == 0 or weight.numel() == 0:
            return reference.forward(*arguments)  # no rows, features or outputs: at most a bias, no launch
        call = _Forward(*arguments)
        algorithm(call)
        return call.output, call.z, *call.again

    return run


@_forward
def lora_linear_full(call: _Forward) -> None:
    """One launch besides packing: z is computed in the loop of the base product."""
    assert call.dropout.seed is None and call.rank <= MAX_FULL_RANK
    call.product(call.pack(), full=True)


@_forward
def lora_linear_prologue(call: _Forward) -> None:
    """z first, then the base product on top of the low-rank term."""
    packed = call.pack()
    rows_pass(call.x, packed, call.z, dropout=call.dropout)
    call.product(packed)


@_forward
def lora_linear_addmm(call: _Forward) -> None:
    """z, then the low-rank term and bias as y, then BLAS adds the base product to it."""
    packed = call.pack()
    rows_pass(call.x, packed, call.z, dropout=call.dropout)
    call.product(packed, base=False)
    call.y.addmm_(call.x, call.weight.T)


@_forward
def lora_linear_concat(call: _Forward) -> None:
    """One BLAS product of [x, z] and [W, sB]; both are written once."""
    width = call.d_in + padded(call.rank)
    right = call.weight.new_empty(call.d_out, width)
    right[:, : call.d_in].copy_(call.weight)
    packed = call.pack(b=right[:, call.d_in :])
    left = call.x.new_empty(call.x.shape[0], width)
    rows_pass(call.x, packed, call.z, u_copy=left[:, call.d_in :], x_copy=left, dropout=call.dropout)
    if call.bias is None:
        torch.mm(left, right.T, out=call.y)
    else:
        torch.addmm(call.bias, left, right.T, out=call.y)


def lora_linear_backward_prologue(*arguments: Any) -> list[Tensor]:
    """dx by the Triton product on top of u A."""
    return _backward("prologue", *arguments)


def lora_linear_backward_addmm(*arguments: Any) -> list[Tensor]:
    """dx by BLAS on top of u A."""
    return _backward("addmm", *arguments)


def lora_linear_backward_concat(*arguments: Any) -> list[Tensor]:
    """dx as one BLAS product of [dy, u] and [W; A]."""
    return _backward("concat", *arguments)


def _backward(
    algorithm: str,
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
    again: Sequence[Tensor] = (),
) -> list[Tensor]:
    if dy.numel() == 0 or weight.numel() == 0:
        return reference.backward(
            dy, x, weight, bias, z, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed, needs
        )
    grad, dropout = _matrix(dy), Dropout.of(dropout_p, seed)
    x2 = None if x is None else _matrix(x)
    (d_out, d_in), count = weight.shape, grad.shape[0]
    need_x, need_weight, need_bias = needs[:3]
    need_as, need_bs, need_scales = by_kind(needs[3:])
    rp = padded(sum(a.shape[0] for a in lora_as))
    concat = algorithm == "concat" and need_x
    left = grad.new_empty(count, d_out + rp) if concat else None
    right = weight.new_empty(d_out + rp, d_in) if concat else None
    low_rank = need_x or any((*need_as, *need_bs, *need_scales))
    grads: list[Tensor] = []
    if need_x:
        grads.append(grad.new_empty(count, d_in))
    if need_weight:
        assert x2 is not None
        grads.append(torch.mm(grad.T, x2))
    if not low_rank:
        return [*grads, *([grad.sum(0, dtype=torch.float32).to(grad.dtype)] if need_bias else [])]

    packed = pack(
        lora_as, lora_bs, scales, scale_factors, rows, grad, d_out,
        a=None if right is None else right[d_out:], again=again if right is None else (),
    )  # fmt: skip
    # One read of dy for u, dB, ds and the bias; columns that no adapter owns are read for the bias alone.
    whole = need_bias or left is not None
    lo, hi = (0, d_out) if whole else (packed.lo, packed.hi)
    need_u, need_g = need_x or any(need_as), any(need_bs) or any(need_scales)
    dbs, dss = _like(packed.lora_bs, need_bs), _scale_sums(packed, need_scales, grad.device)
    dbias = None
    if need_bias:
        assert bias is not None
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    parts = columns_pass(
        grad[:, lo:hi], z if need_g else None, Gradients(packed, dbs, dss, lo=lo, bias=dbias),
        p=packed.b[lo:hi] if need_u else None, x_copy=left,
    )  # fmt: skip
    u = None
    if parts is not None:
        u = grad.new_empty(count, rp) if left is None else left[:, d_out:]
        in_product = need_x and left is None and parts.shape[0] * rp <= PARTS_IN_PRODUCT
        if not in_product:
            add_up(parts, u)
            parts = None
    if need_x:
        assert u is not None
        _input_gradient(algorithm, grad, weight, packed, u, parts, grads[0], dropout, left, right)
        grads[0] = grads[0].view(*dy.shape[:-1], d_in)
    if dbias is not None:
        grads.append(dbias)
    das = _like(packed.lora_as, need_as)
    if any(need_as):
        assert x2 is not None and u is not None
        columns_pass(x2, u, Gradients(packed, das, [None] * len(das), transposed=True), dropout=dropout)
    return [*grads, *(t for t in (*das, *dbs, *_of_scales(packed, dss)) if t is not None)]


def _like(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip(tensors, needs, strict=True)]  # fmt: skip


def _scale_sums(packed: Packed, needs: Sequence[bool], device: torch.device) -> list[Tensor | None]:
    """Room for the gradient of each scale, rank by rank; that of one number is added up later."""
    found: list[Tensor | None] = []
    for a, scale, need in zip(packed.lora_as, packed.scales, needs, strict=True):
        dtype = torch.float32 if scale is None or scale.dim() == 0 else scale.dtype
        found.append(torch.empty(a.shape[0], dtype=dtype, device=device) if need else None)
    return found


def _of_scales(packed: Packed, dss: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        ds if ds is None or scale is None or scale.dim() > 0 else ds.sum().to(scale.dtype)
        for ds, scale in zip(dss, packed.scales, strict=True)
    ]


def _input_gradient(
    algorithm: str,
    grad: Tensor,
    weight: Tensor,
    packed: Packed,
    u: Tensor,
    parts: Tensor | None,
    dx: Tensor,
    dropout: Dropout,
    left: Tensor | None,
    right: Tensor | None,
) -> None:
    """dx = dy W + drop(u A), in place; `parts` of u, where given, are added up to it."""
    if left is not None:
        assert right is not None
        right[: weight.shape[0]].copy_(weight)
        torch.mm(left, right, out=dx)
        return
    base = algorithm == "prologue"
    weight = addressable(weight)
    z, z_sum = (u, None) if parts is None else (parts, u)
    product(
        grad, weight, (packed.b.T, packed.a.T), z, None, dx, (0, dx.shape[1]), base=base, dropout=dropout,
        transposed=True, z_sum=z_sum,
    )  # fmt: skip
    if not base:
        dx.addmm_(grad, weight)
