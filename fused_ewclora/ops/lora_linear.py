# SPDX-License-Identifier: Apache-2.0
"""Autograd of the LoRA linear: save x and z, call the op, return what was asked for.

Where the op could not be followed (second derivatives, `torch.func`, forward-mode differentiation,
`torch.jit.trace`) `reference.differentiable` takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, FisherError
from ..reference import differentiable
from . import dispatch, schemas
from ._distinct import distinct
from .adapters import Adapters, by_kind
from .capture import CallCapture, CallIndex
from .dispatch import Candidate


@dataclass(frozen=True)
class LoRALinearMeta:
    """The constants of one call besides its adapters' own; `rows` as in `schemas`."""

    rows: list[int]
    dropout_p: float
    backend: str


TRANSFORMS = "a transform of torch.func, batched gradients, forward-mode differentiation or torch.jit.trace"


class Captured:
    """One call of a layer whose Fisher is collected; the node on autograd's tape, in Python or C++, tells it
    what came."""

    __slots__ = ("_capture", "_followed", "_index")

    def __init__(self, capture: CallCapture) -> None:
        self._capture, self._followed = capture, False
        self._index: CallIndex = None

    def forward(self, x: Tensor) -> None:
        """x of the forward."""
        self._index = self._capture.note_forward(x)

    def backward(self, x: Tensor, dy: Tensor, followed: bool) -> None:
        """x and dy of a backward; of one that is `followed`, of which a graph is made, without that graph."""
        if not followed and not self._followed:
            return self._capture.record(x, dy, self._index)
        if self._followed:
            raise FisherError(
                "a Fisher pass: a loss that contains gradients of the model (create_graph=True) was "
                "backpropagated, and a layer records no second derivatives; use a loss without them in the "
                "pass"
            )
        if schemas.is_transformed(dy):
            raise FisherError(f"a Fisher pass: expected one backward of plain tensors, got {TRANSFORMS}")
        self._followed = True
        with torch.no_grad():
            return self._capture.record(x, dy, self._index)


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + sum over adapters of ((x A^T) * s) B^T on their rows."""

    @staticmethod
    def forward(
        ctx: Any,
        meta: LoRALinearMeta,
        scale_factors: list[float],
        capture: CallCapture | None,
        candidate: Candidate | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors_and_seed: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns y and, where x has a graph and is not kept, z: the graph of z is then the only way to x for
        derivatives of dB and ds."""
        *tensors, seed = tensors_and_seed
        args = (
            x, weight, bias, *by_kind(tensors), scale_factors, meta.rows, meta.dropout_p, seed, meta.backend,
        )  # fmt: skip
        y, z = (
            schemas.lora_linear(*args) if candidate is None else schemas.run(candidate, x.device.type, args)
        )
        need_x, need_weight, _, *needs = ctx.needs_input_grad[4:-1]
        need_as, need_bs, need_scales = by_kind(needs)
        # A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
        keep_x = need_weight or any(need_as) or capture is not None
        keep_z = any(need_bs) or any(need_scales)
        kept = (x if keep_x else None, weight, bias, z if keep_z else None)
        ctx.save_for_backward(*kept, *tensors_and_seed)
        ctx.meta, ctx.scale_factors, ctx.captured = meta, scale_factors, None
        if capture is not None:
            ctx.captured = Captured(capture)
            ctx.captured.forward(x)
        if keep_x or not (keep_z and need_x) or torch.compiler.is_compiling():
            return y
        ctx.set_materialize_grads(False)
        ctx.shape = y.shape
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, z, *tensors, seed = ctx.saved_tensors
        meta, needs = ctx.meta, list(ctx.needs_input_grad[4:-1])
        if dy is None:  # not materialised, as z is an output as well
            dy = weight.new_zeros(ctx.shape)
        rest = (
            x, weight, bias, z, *by_kind(tensors), ctx.scale_factors, meta.rows, meta.dropout_p, seed, needs,
        )  # fmt: skip
        followed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or dz is not None or schemas.is_transformed(dy)
        )
        if ctx.captured is not None:
            ctx.captured.backward(x, dy, followed)
        if followed:
            with torch.autocast(dy.device.type, enabled=False):
                found = differentiable.lora_linear_backward(dy, dz, *rest)
        else:
            found = schemas.lora_linear_backward(dy, *rest, meta.backend)
        grads = iter(found)
        return (None, None, None, None, *[next(grads) if need else None for need in needs], None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    meta: LoRALinearMeta,
    seed: Tensor | None,
    capture: CallCapture | None,
) -> Tensor:
    """y of arguments that have been checked."""
    args = (x, weight, bias, *adapters, meta.rows, meta.dropout_p, seed, meta.backend)
    inputs = [x, weight, bias, *adapters.tensors(), seed]
    candidate = schemas.unobserved("lora_linear", inputs, args)
    if candidate is None and schemas.is_transformed():
        return _transformed(args, capture)
    # Inference has nothing to save, and entering a Function costs more than the dispatch of the op. A capture
    # counts calls without gradients too: reentrant checkpointing makes them before its backward.
    if capture is None and not torch.is_grad_enabled():
        if candidate is None:
            return schemas.lora_linear(*args)[0]
        return schemas.run(candidate, x.device.type, args)[0]
    found = LoRALinearFunction.apply(meta, adapters.scale_factors, capture, candidate, *distinct(inputs))
    return found[0] if isinstance(found, tuple) else found


def _linear_backend(asked: str, *args: Any) -> Any:
    """What serves eager calls with these arguments in C++, forward and backward, or None."""
    call, gradient_call = (
        schemas.call_of(op, args[0], (*args, asked)) for op in ("lora_linear", "lora_linear_backward")
    )
    forward = dispatch.choose("lora_linear", asked, call)
    if forward.linear is None:
        return None
    try:
        backward = dispatch.choose("lora_linear_backward", asked, gradient_call)
    except BackendError:  # only a backward, if there is one, is an error
        return None
    return forward.linear(backward)


@functools.cache
def eager() -> Callable[..., Tensor | None] | None:
    """`eager_lora_linear` of the C++ extension, which returns None for calls that it leaves to Python; None
    without the extension."""
    extension = dispatch.extension()
    if extension is None:
        return None
    extension.choose_linear_by(_linear_backend)
    return extension.eager_lora_linear


def _transformed(args: tuple[Any, ...], capture: CallCapture | None) -> Tensor:
    if capture is not None:
        raise FisherError(f"a Fisher pass: expected plain calls of its layers, got one inside {TRANSFORMS}")
    with torch.autocast(args[0].device.type, enabled=False):
        return differentiable.lora_linear(*args[:-1])
