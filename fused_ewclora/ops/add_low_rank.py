# SPDX-License-Identifier: Apache-2.0
"""Autograd of what adapters add to a product that another library computes: save x and z, return what was
asked for, and tell the Fisher's capture what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FisherError
from ..reference import add_low_rank as formulas
from . import schemas
from ._distinct import distinct
from .adapters import Adapters, by_kind
from .capture import CallCapture
from .lora_linear import TRANSFORMS, Captured


@dataclass(frozen=True)
class AddLowRankMeta:
    """The constants of one call; `rows` as in `schemas`."""

    rows: list[int]
    scale_factors: list[float]
    dropout_p: float


class AddLowRankFunction(torch.autograd.Function):
    """y + x R^T + sum over adapters of ((x A^T) * s) B^T on their rows."""

    @staticmethod
    def forward(
        ctx: Any,
        meta: AddLowRankMeta,
        capture: CallCapture | None,
        y: Tensor,
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        args = (residual, *by_kind(tensors), meta.scale_factors, meta.rows, meta.dropout_p, seed)
        total, zs = formulas.forward(y, x, *args)
        ctx.save_for_backward(x, residual, seed, *tensors, *zs)
        ctx.meta, ctx.count, ctx.captured = meta, len(tensors), None
        if capture is not None:
            ctx.captured = Captured(capture)
            ctx.captured.forward(x)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, seed, *rest = ctx.saved_tensors
        tensors, zs = rest[: ctx.count], rest[ctx.count :]
        meta, needs = ctx.meta, [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]]
        followed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or schemas.is_transformed(dy)
        )
        if ctx.captured is not None:
            wide = torch.promote_types(x.dtype, dy.dtype)
            ctx.captured.backward(x.to(wide), dy.to(wide), followed)
        with torch.autocast(dy.device.type, enabled=False):
            found = formulas.backward(
                dy, x, None if followed else zs, residual, *by_kind(tensors), meta.scale_factors, meta.rows,
                meta.dropout_p, seed, needs,
            )  # fmt: skip
        grads = iter(found)
        dx, *others = [next(grads) if need else None for need in needs]
        return (None, None, dy if ctx.needs_input_grad[2] else None, dx, None, None, *others)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    adapters: Adapters,
    meta: AddLowRankMeta,
    seed: Tensor | None,
    capture: CallCapture | None,
) -> Tensor:
    """The sum for arguments that have been checked."""
    args = (y, x, residual, *adapters, meta.rows, meta.dropout_p, seed)
    with torch.autocast(x.device.type, enabled=False):
        if not torch.compiler.is_compiling() and schemas.is_transformed():
            if capture is not None:
                raise FisherError(
                    f"a Fisher pass: expected plain calls of its layers, got one in {TRANSFORMS}"
                )
            return formulas.add_low_rank(*args)
        if capture is None and not torch.is_grad_enabled():
            return formulas.forward(*args)[0]
        found: Tensor = AddLowRankFunction.apply(
            meta, capture, *distinct([y, x, residual, seed, *adapters.tensors()])
        )
        return found
