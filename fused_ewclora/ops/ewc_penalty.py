"""Autograd of the EWC penalty: gradients are computed with the loss, backward only scales them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library


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
        penalty, grads = _library.ewc_penalty(
            fishers, lora_as, lora_bs, scales, factors, ewc_lambda, needs, backend
        )
        ctx.save_for_backward(*grads)
        # Which input each gradient belongs to, and the dtype it must come back in.
        ctx.slots = [i for i, t in enumerate(adapters) if t is not None and needs[i % 3]]
        ctx.dtypes = [None if t is None else t.dtype for t in adapters]
        return penalty

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_penalty: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(list(ctx.saved_tensors), grad_penalty)
        dtypes, wanted = ctx.dtypes, ctx.needs_input_grad[4:]
        grads: list[Tensor | None] = [None] * len(dtypes)
        for slot, grad in zip(ctx.slots, scaled, strict=True):
            if wanted[slot]:
                grads[slot] = grad if grad.dtype == dtypes[slot] else grad.to(dtypes[slot])
        return (None, None, None, None, *grads)
