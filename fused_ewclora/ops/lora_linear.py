"""Autograd of the LoRA linear: save x and z, call the op, return what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import schemas
from ._distinct import distinct
from ._once import once
from .adapters import Adapters, by_kind
from .capture import FisherCapture
from .dispatch import Candidate


@dataclass(frozen=True)
class LoRALinearMeta:
    """The constants of one call besides its adapters' own; `rows` as in `schemas`."""

    rows: list[int]
    dropout_p: float
    backend: str


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + sum over adapters of ((x A^T) * s) B^T on their rows."""

    @staticmethod
    def forward(
        ctx: Any,
        meta: LoRALinearMeta,
        scale_factors: list[float],
        capture: FisherCapture | None,
        candidate: Candidate | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors_and_seed: Tensor | None,
    ) -> Tensor:
        *tensors, seed = tensors_and_seed
        args = (
            x, weight, bias, *by_kind(tensors), scale_factors, meta.rows, meta.dropout_p, seed, meta.backend,
        )  # fmt: skip
        y, z = (
            schemas.lora_linear(*args) if candidate is None else schemas.run(candidate, x.device.type, args)
        )
        _, need_weight, _, *needs = ctx.needs_input_grad[4:-1]
        need_as, need_bs, need_scales = by_kind(needs)
        # A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
        keep_x = need_weight or any(need_as) or capture is not None
        keep_z = any(need_bs) or any(need_scales)
        kept = (x if keep_x else None, weight, bias, z if keep_z else None)
        ctx.save_for_backward(*kept, *tensors_and_seed)
        ctx.meta, ctx.scale_factors, ctx.capture = meta, scale_factors, capture
        if capture is not None:
            ctx.rows_to_samples = capture.note_forward(x)
        return y

    @staticmethod
    @once("lora_linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, z, *tensors, seed = ctx.saved_tensors
        meta, needs = ctx.meta, list(ctx.needs_input_grad[4:-1])
        if ctx.capture is not None:
            ctx.capture.record(x, dy, ctx.rows_to_samples)
        grads = iter(
            schemas.lora_linear_backward(
                dy, x, weight, bias, z, *by_kind(tensors), ctx.scale_factors, meta.rows, meta.dropout_p, seed,
                needs, meta.backend,
            )
        )  # fmt: skip
        return (None, None, None, None, *[next(grads) if need else None for need in needs], None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    meta: LoRALinearMeta,
    seed: Tensor | None,
    capture: FisherCapture | None,
) -> Tensor:
    """y of arguments that have been checked."""
    args = (x, weight, bias, *adapters, meta.rows, meta.dropout_p, seed, meta.backend)
    # Inference has nothing to save, and entering a Function costs more than the dispatch of the op. A capture
    # counts calls without gradients too: reentrant checkpointing makes them before its backward.
    if capture is None and not torch.is_grad_enabled():
        return schemas.lora_linear(*args)[0]
    inputs = [x, weight, bias, *adapters.tensors(), seed]
    candidate = schemas.unobserved("lora_linear", inputs, args)
    if candidate is not None and candidate.recorded is not None and capture is None:
        return candidate.recorded(*args[:-1])
    return LoRALinearFunction.apply(meta, adapters.scale_factors, capture, candidate, *distinct(inputs))
