"""Autograd of the EWC penalty: gradients are computed with the loss, backward only scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, schemas
from ._distinct import distinct
from ._once import once
from .adapters import Adapters, by_kind


class Layout(NamedTuple):
    """Which tensors of `Adapters` the gradients in the flat result of the op belong to, with their shapes and
    dtypes. Parallel lists, because every step hands out hundreds of gradients."""

    inputs: list[int]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


def layout(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> Layout:
    """The layout of the gradients of the kinds that `needs` asks for."""
    adapters = len(tensors) // 3
    wanted = [(i, t) for i, t in enumerate(tensors) if t is not None and needs[i // adapters]]
    return Layout([i for i, _ in wanted], [t.shape for _, t in wanted], [t.dtype for _, t in wanted])


def unflatten(flat: Tensor, order: Layout) -> list[Tensor]:
    """The gradients in the shapes and dtypes of their inputs; views where the dtype is that of `flat`, which
    begins where its memory does."""
    grads, start = [], 0
    for shape in order.shapes:  # one call each: a view of a slice is two, and views of views are slow
        strides = (shape[1], 1) if len(shape) == 2 else (1,) * len(shape)
        grads.append(flat.as_strided(shape, strides, start))
        start += shape.numel()
    if all(dtype == flat.dtype for dtype in order.dtypes):
        return grads
    return [grad.to(dtype) for grad, dtype in zip(grads, order.dtypes, strict=True)]


def kinds(wanted: Sequence[bool]) -> list[bool]:
    """Whether any A, any B, any s wants a gradient."""
    return [any(of_kind) for of_kind in by_kind(wanted)]


class EWCPenaltyFunction(torch.autograd.Function):
    """P = (lambda/2) sum over adapters of sum F * (B diag(s) A)^2."""

    @staticmethod
    def forward(
        ctx: Any,
        fishers: list[Tensor],
        scale_factors: list[float],
        ewc_lambda: float,
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = kinds(ctx.needs_input_grad[4:])
        lora_as, lora_bs, scales = by_kind(tensors)
        penalty, flat = schemas.ewc_penalty(
            fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs, backend
        )
        ctx.save_for_backward(flat)
        ctx.layout, ctx.inputs = layout(tensors, needs), len(tensors)
        return penalty

    @staticmethod
    @once("ewc_penalty")
    def backward(ctx: Any, grad_penalty: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.inputs
        wanted = ctx.needs_input_grad[4:]  # builds a tuple whenever it is read
        for index, grad in zip(ctx.layout.inputs, unflatten(flat * grad_penalty, ctx.layout), strict=True):
            if wanted[index]:
                grads[index] = grad
        return (None, None, None, None, *grads)


def ewc_penalty(
    fishers: list[Tensor],
    adapters: Adapters,
    ewc_lambda: float,
    backend: str,
) -> Tensor:
    """The penalty of arguments that have been checked."""
    tensors, graph = adapters.tensors(), torch.is_grad_enabled()
    needs = kinds([graph and t is not None and t.requires_grad for t in tensors])
    args = (fishers, *adapters, ewc_lambda, needs, backend)
    candidate = schemas.unobserved("ewc_penalty", [*fishers, *tensors], args)
    recorded = dispatch.recorded_penalty() if candidate is not None else None
    if candidate is None or (recorded is None and any(needs)):
        constants = (adapters.scale_factors, ewc_lambda, backend)
        return EWCPenaltyFunction.apply(fishers, *constants, *distinct(tensors))
    with torch.no_grad():
        penalty, flat = schemas.run(candidate, fishers[0].device.type, args)
    if recorded is None or not any(needs):
        return penalty
    return recorded(adapters.lora_as, adapters.lora_bs, adapters.scales, penalty, flat, needs)
