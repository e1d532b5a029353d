"""Autograd of the EWC penalty: gradients are computed with the loss, backward only scales them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library


class Slot(NamedTuple):
    """Where a gradient goes: which of the flat inputs A, B, s, A, B, s, … and in what form."""

    input: int
    shape: torch.Size
    dtype: torch.dtype


def slots(adapters: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Slot]:
    """The order of the gradients in the flat result of the op."""
    return [Slot(i, t.shape, t.dtype) for i, t in enumerate(adapters) if t is not None and needs[i % 3]]


def unflatten(flat: Tensor, order: Sequence[Slot]) -> Iterator[tuple[Slot, Tensor]]:
    """Views of the flat gradients in the shapes of their inputs."""
    parts = flat.split([slot.shape.numel() for slot in order])
    return ((slot, part.view(slot.shape)) for slot, part in zip(order, parts, strict=True))


class EWCPenaltyFunction(torch.autograd.Function):
    """P = (lambda/2) sum over adapters of sum F * (B diag(s) A)^2."""

    @staticmethod
    def forward(
        ctx: Any,
        factors: tuple[float, ...],
        ewc_lambda: float,
        backend: str,
        fishers: Sequence[Tensor],
        *adapters: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[4:]
        needs = [any(wanted[0::3]), any(wanted[1::3]), any(wanted[2::3])]
        lora_as, lora_bs, scales = list(adapters[0::3]), list(adapters[1::3]), list(adapters[2::3])
        penalty, flat = _library.ewc_penalty(
            fishers, lora_as, lora_bs, scales, factors, ewc_lambda, needs, backend
        )
        ctx.save_for_backward(flat)
        # Which inputs the gradients belong to, and the shape and dtype that each must come back in.
        ctx.slots, ctx.inputs = slots(adapters, needs), len(adapters)
        return penalty

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_penalty: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.inputs
        for slot, grad in unflatten(flat * grad_penalty, ctx.slots):
            if ctx.needs_input_grad[4 + slot.input]:
                grads[slot.input] = grad.to(slot.dtype)
        return (None, None, None, None, *grads)
