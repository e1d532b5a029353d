# SPDX-License-Identifier: Apache-2.0
"""Autograd of the penalties (`schemas.PENALTIES`): gradients are computed with the loss, backward only scales
them, unless a graph of it is made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..reference import differentiable
from . import dispatch, memory, schemas
from ._distinct import distinct
from .adapters import Adapters, Scale, by_kind


class Terms(Protocol):
    """The arguments of a penalty as C++ has checked them: plain tensors that fit together."""

    rank: int  # the largest
    numbers: bool  # whether every scale is a number
    needs: list[bool]  # whether any A, any B, any s requires gradients

    def record(self, ewc_lambda: float, penalty: Tensor, flat: Tensor) -> Tensor:
        """The penalty on autograd's tape, with the gradients in `flat`; once."""

    def add_gradients(self, flat: Tensor) -> bool:
        """Adds the gradients in `flat` to `.grad`; False where that has not the common form, and nothing was
        done."""


def terms(
    op: str,
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None,
) -> Terms | None:
    """The terms of a call in the common form that nobody observes. None: the checks in Python have to see it,
    and then the dispatcher. Those take ten times as long, for hundreds of tensors in every training step."""
    if torch.compiler.is_compiling():
        return None
    of = dispatch.penalty_terms()
    found = None if of is None else of(op, fishers, lora_as, lora_bs, scales)
    return found if found is not None and schemas.unwatched() else None


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


class PenaltyFunction(torch.autograd.Function):
    """P = (lambda/2) sum over adapters of sum F * (B diag(s) A)^2, the penalty of another structure of F, or
    lambda sum |B diag(s) A|, without fishers; `op` computes it."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        fishers: list[Tensor],
        scale_factors: list[float],
        ewc_lambda: float,
        backend: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = kinds(ctx.needs_input_grad[5:])
        lora_as, lora_bs, scales = by_kind(tensors)
        penalty, flat = schemas.penalties[op](
            fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs, backend
        )
        ctx.layout, ctx.inputs = layout(tensors, needs), len(tensors)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(flat, *tensors)
        else:
            ctx.save_for_backward(flat)
            operands = (fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs)
            ctx.op, ctx.operands, ctx.versions = op, operands, _versions([*fishers, *tensors])
        return penalty

    @staticmethod
    def backward(ctx: Any, grad_penalty: Tensor) -> tuple[Tensor | None, ...]:
        flat, *operands = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.inputs
        wanted = ctx.needs_input_grad[5:]  # builds a tuple whenever it is read
        if torch.compiler.is_compiling():
            found = unflatten(schemas.scaled_gradients(flat, grad_penalty, operands), ctx.layout)
        elif torch.is_grad_enabled() or schemas.is_transformed(grad_penalty):
            found = _differentiable_gradients(ctx, grad_penalty)
        else:
            found = unflatten(flat * grad_penalty, ctx.layout)
        for index, grad in zip(ctx.layout.inputs, found, strict=True):
            if wanted[index]:
                grads[index] = grad
        return (None, None, None, None, None, *grads)


def _versions(tensors: Sequence[Tensor | None]) -> int:
    """Versions only grow, so that their sum tells whether one of the tensors has been written."""
    return sum(t._version for t in tensors if t is not None and not t.is_inference())


def _differentiable_gradients(ctx: Any, grad_penalty: Tensor) -> list[Tensor]:
    """The gradients with a graph, from what the penalty was computed from. That is no output and outlives the
    step anyway; saving hundreds of tensors would cost more than the rest of the forward."""
    fishers, lora_as, lora_bs, scales, *_ = ctx.operands
    if ctx.versions != _versions([*fishers, *lora_as, *lora_bs, *scales]):
        raise RuntimeError(
            f"{ctx.op}: a Fisher, adapter or scale has been modified by an inplace operation since the "
            "penalty was computed, so that its second derivatives cannot be; compute the penalty again"
        )
    with torch.autocast(grad_penalty.device.type, enabled=False):
        return _DIFFERENTIABLE[ctx.op][1](grad_penalty, *ctx.operands)


_DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]] = {
    "ewc_penalty": (differentiable.ewc_penalty, differentiable.ewc_penalty_backward),
    "factored_penalty": (differentiable.kronecker_penalty, differentiable.kronecker_penalty_backward),
    "kronecker_penalty": (differentiable.kronecker_penalty, differentiable.kronecker_penalty_backward),
    "l1_penalty": (differentiable.l1_penalty, differentiable.l1_penalty_backward),
}


def penalty(
    op: str,
    fishers: list[Tensor],
    adapters: Adapters,
    ewc_lambda: float,
    backend: str,
    found: Terms | None = None,
) -> Tensor:
    """The penalty of arguments that have been checked; `found` are their terms."""
    if found is not None:
        return _of_terms(op, found, fishers, adapters, ewc_lambda, backend)
    tensors, graph, device = adapters.tensors(), torch.is_grad_enabled(), adapters.lora_as[0].device.type
    needs = kinds([graph and t is not None and t.requires_grad for t in tensors])
    args = (fishers, *adapters, ewc_lambda, needs, backend)
    candidate = schemas.unobserved(op, [*fishers, *tensors], args)
    if candidate is None and schemas.is_transformed():
        with torch.autocast(device, enabled=False):
            return _DIFFERENTIABLE[op][0](fishers, *adapters, ewc_lambda)
    recorded = dispatch.recorded_penalty() if candidate is not None else None
    if candidate is None or (recorded is None and any(needs)):
        constants = (adapters.scale_factors, ewc_lambda, backend)
        return PenaltyFunction.apply(op, fishers, *constants, *distinct(tensors))
    with torch.no_grad():
        value, flat = schemas.run(candidate, device, args)
    if recorded is None or not any(needs):
        return value
    return recorded(op, fishers, *adapters, ewc_lambda, needs, value, flat)


def _of_terms(
    op: str, found: Terms, fishers: list[Tensor], adapters: Adapters, ewc_lambda: float, backend: str
) -> Tensor:
    needs = found.needs if torch.is_grad_enabled() else [False] * 3
    args = (found.rank, fishers, adapters, ewc_lambda, needs, backend)
    with torch.no_grad():
        value, flat = schemas.penalty_of_plain(op, *args)
    return found.record(ewc_lambda, value, flat) if any(needs) else value


def penalty_grad_(
    op: str,
    fishers: list[Tensor],
    adapters: Adapters,
    ewc_lambda: float,
    grad_scale: float | Tensor,
    backend: str,
    found: Terms | None = None,
) -> Tensor:
    """Adds grad_scale * dP to `.grad` for arguments that have been checked, without a graph; returns P."""
    if found is not None:
        args = (found.rank, fishers, adapters, ewc_lambda, found.needs, backend)
        value, flat = schemas.penalty_of_plain(op, *args)
    else:
        needs = kinds([t is not None and t.requires_grad for t in adapters.tensors()])
        value, flat = schemas.penalties[op](fishers, *adapters, ewc_lambda, needs, backend)
    if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
        flat *= grad_scale
    if found is None or not found.add_gradients(flat):
        _add_to_grads(_gradients(adapters.tensors(), flat))
    return value


def _gradients(tensors: Sequence[Tensor | None], flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tensor, its gradient) for those that require one, where `flat` has the gradients of their kinds."""
    wanted = [t is not None and t.requires_grad for t in tensors]
    order = layout(tensors, kinds(wanted))
    found = []
    for index, new in zip(order.inputs, unflatten(flat, order), strict=True):
        tensor = tensors[index]
        if tensor is not None and wanted[index]:
            found.append((tensor, new))
    return found


def _apart(tensors: list[Tensor]) -> bool:
    """Whether no two of them are one tensor, or share memory."""
    if len(set(map(id, tensors))) < len(tensors):
        return False
    if not dispatch.are_plain()([*tensors]):
        return True  # subclasses, whose memory cannot be looked at
    spans = sorted((t.data_ptr(), t.data_ptr() + memory.span(t) * t.element_size()) for t in tensors)
    return all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


def _add_to_grads(gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Adds to `.grad` of every (parameter, its gradient), all of them or none."""
    fresh, held, added = [], [], []
    for parameter, new in gradients:
        if (old := parameter.grad) is None:
            fresh.append((parameter, new))
        else:
            held.append(old)
            added.append(new)
    if not all(old.is_contiguous() for old in held):
        memory.check_written({f"grad of a parameter of shape {list(old.shape)}": old for old in held}, {})
    if torch.compiler.is_compiling() or _apart(held):
        if held:
            torch._foreach_add_(held, added)
    else:  # as of one parameter in several adapters: a joint addition could lose all terms but one
        for old, new in zip(held, added, strict=True):
            old.add_(new)
    for parameter, new in fresh:
        if parameter.grad is None:
            parameter.grad = new
        else:
            parameter.grad.add_(new)
