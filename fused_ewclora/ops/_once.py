"""Gradients that are not differentiable themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, ...]


def once(operation: str) -> Callable[[Callable[..., _Gradients]], Callable[..., _Gradients]]:
    """Makes the backward of an autograd.Function run without a graph; where one is made (create_graph=True),
    its gradients raise when somebody differentiates them.

    `torch.autograd.function.once_differentiable` lets them pass as constants where the incoming gradient is
    one, although they depend on what was saved: second derivatives would silently lack that part.
    """

    def decorate(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> _Gradients:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            given = [g.detach().requires_grad_() for g in found if g is not None]
            message = f"{operation}: its gradients cannot be differentiated again"
            refused = iter(_Refusal.apply(message, *given)) if given else iter(())
            return tuple(None if g is None else next(refused) for g in found)

        return run

    return decorate


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(gradient.data for gradient in gradients)  # no views: those refuse changes in place

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)
