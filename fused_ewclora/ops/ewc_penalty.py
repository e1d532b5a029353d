"""Autograd of the EWC penalty: gradients are computed with the loss, backward only scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, schemas
from ._distinct import distinct
from ._once import once


class Layout(NamedTuple):
    """Of the gradients in the flat result of the op: which of the inputs A, B, s, A, B, s, … they belong to,
    and how those look. Lists side by side: hundreds of gradients are dealt out in every step."""

    inputs: list[int]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


def layout(adapters: Sequence[Tensor | None], needs: Sequence[bool]) -> Layout:
    """The order in which the op leaves the gradients that `needs` asks for, by kind."""
    given = [(i, t) for i, t in enumerate(adapters) if t is not None and needs[i % 3]]
    return Layout([i for i, _ in given], [t.shape for _, t in given], [t.dtype for _, t in given])


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
    return [any(wanted[0::3]), any(wanted[1::3]), any(wanted[2::3])]


class EWCPenaltyFunction(torch.autograd.Function):
    """P = (lambda/2) sum over adapters of sum F * (B diag(s) A)^2."""

    @staticmethod
    def forward(
        ctx: Any,
        factors: list[float],
        ewc_lambda: float,
        backend: str,
        fishers: list[Tensor],
        *adapters: Tensor | None,
    ) -> Tensor:
        needs = kinds(ctx.needs_input_grad[4:])
        lora_as, lora_bs, scales = list(adapters[0::3]), list(adapters[1::3]), list(adapters[2::3])
        penalty, flat = schemas.ewc_penalty(
            fishers, lora_as, lora_bs, scales, factors, ewc_lambda, needs, backend
        )
        ctx.save_for_backward(flat)
        ctx.layout, ctx.inputs = layout(adapters, needs), len(adapters)
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
    factors: list[float],
    ewc_lambda: float,
    backend: str,
    fishers: list[Tensor],
    adapters: Sequence[Tensor | None],
) -> Tensor:
    """`adapters` is flat: A, B, scale tensor or None, per adapter."""
    lora_as, lora_bs, scales = list(adapters[0::3]), list(adapters[1::3]), list(adapters[2::3])
    graph = torch.is_grad_enabled()
    needs = kinds([graph and t is not None and t.requires_grad for t in adapters])
    args = (fishers, lora_as, lora_bs, scales, factors, ewc_lambda, needs, backend)
    candidate = schemas.unobserved("ewc_penalty", [*fishers, *adapters], args)
    recorded = dispatch.recorded_penalty() if candidate is not None else None
    if candidate is None or (recorded is None and any(needs)):
        return EWCPenaltyFunction.apply(factors, ewc_lambda, backend, fishers, *distinct(adapters))
    with torch.no_grad():
        penalty, flat = schemas.run(candidate, fishers[0].device.type, args)
    return penalty if recorded is None or not any(needs) else recorded(adapters, penalty, flat, needs)
