"""Autograd of the LoRA linear: save x and z, call the op, return what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import schemas
from ._distinct import distinct
from ._once import once
from .capture import FisherCapture
from .dispatch import Candidate


@dataclass(frozen=True)
class LoRALinearMeta:
    """The constants of one call; `rows` and `factors` as in `schemas`, which takes lists."""

    factors: list[float]
    rows: list[int]
    dropout_p: float
    backend: str

    def constants(self, seed: Tensor | None) -> tuple[Any, ...]:
        """The last arguments of the op."""
        return self.factors, self.rows, self.dropout_p, seed, self.backend


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + sum over adapters of ((x A^T) * s) B^T on their rows."""

    @staticmethod
    def forward(
        ctx: Any,
        meta: LoRALinearMeta,
        capture: FisherCapture | None,
        candidate: Candidate | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        *adapters: Tensor | None,
    ) -> Tensor:
        lora_as, lora_bs, scales = list(adapters[0::3]), list(adapters[1::3]), list(adapters[2::3])
        args = (x, weight, bias, lora_as, lora_bs, scales, *meta.constants(seed))
        y, z = (
            schemas.lora_linear(*args) if candidate is None else schemas.run(candidate, x.device.type, args)
        )
        needs = ctx.needs_input_grad
        # A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
        keep_x = needs[4] or any(needs[7::3]) or capture is not None
        keep_z = any(needs[8::3]) or any(needs[9::3])
        ctx.save_for_backward(x if keep_x else None, weight, bias, z if keep_z else None, seed, *adapters)
        ctx.meta, ctx.capture = meta, capture
        if capture is not None:
            capture.note_forward()
        return y

    @staticmethod
    @once("lora_linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, z, seed, *adapters = ctx.saved_tensors
        meta, wanted = ctx.meta, ctx.needs_input_grad
        if ctx.capture is not None:
            ctx.capture.record(x, dy)
        needs = [wanted[3], wanted[4], wanted[5], *wanted[7:]]
        grads = iter(
            schemas.lora_linear_backward(
                dy, x, weight, bias, z, adapters[0::3], adapters[1::3], adapters[2::3],
                meta.factors, meta.rows, meta.dropout_p, seed, needs, meta.backend,
            )
        )  # fmt: skip
        dx, dweight, dbias, *rest = [next(grads) if need else None for need in needs]
        return (None, None, None, dx, dweight, dbias, None, *rest)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Tensor | None],
    meta: LoRALinearMeta,
    seed: Tensor | None,
    capture: FisherCapture | None,
) -> Tensor:
    """`adapters` is flat: A, B, scale tensor or None, per adapter."""
    lora_as, lora_bs, scales = list(adapters[0::3]), list(adapters[1::3]), list(adapters[2::3])
    args = (x, weight, bias, lora_as, lora_bs, scales, *meta.constants(seed))
    # Inference has nothing to save, and entering a Function costs more than the dispatch of the op. A capture
    # counts calls without gradients too: reentrant checkpointing makes them before its backward.
    if capture is None and not torch.is_grad_enabled():
        return schemas.lora_linear(*args)[0]
    tensors = [x, weight, bias, seed, *adapters]
    candidate = schemas.unobserved("lora_linear", tensors, args)
    if candidate is not None and candidate.recorded is not None and capture is None:
        return candidate.recorded(x, weight, bias, seed, adapters, meta.factors, meta.rows, meta.dropout_p)
    return LoRALinearFunction.apply(meta, capture, candidate, *distinct(tensors))
