# SPDX-License-Identifier: Apache-2.0
"""Calls that go through plans: hosts of Triton, as `ptx.cases` has them, and what users call, with
autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from ptx.cases import PRECISIONS, TOLERANCES, Case, cases
from ptx.launches import tensors
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora import use_backend
from fused_ewclora.backends import triton as backend
from fused_ewclora.backends.triton import plans

from . import stub


class Call(Protocol):
    """A call, with arguments that it makes."""

    @property
    def name(self) -> str: ...

    def arguments(self) -> Sequence[Any]: ...

    def others(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Of the same kind at other addresses, where no table holds addresses, with other numbers."""

    def run(self, arguments: Sequence[Any]) -> list[Tensor]: ...

    def exact(self, arguments: Sequence[Any]) -> list[Tensor]: ...

    def allowed(self) -> float: ...

    def precision_set(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class HostCall:
    """A call of a host, as the op makes it."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    def arguments(self) -> Sequence[Any]:
        return self.case.arguments()

    def others(self, arguments: Sequence[Any]) -> Sequence[Any]:
        op = self.case.workload.op
        made = list(arguments if op in plans.BY_ADDRESS else self.case.arguments())
        for place in plans.NUMBERS.get(op, ()):
            made[place] *= 1.75
        return made

    def run(self, arguments: Sequence[Any]) -> list[Tensor]:
        return self.case.run(arguments)

    def exact(self, arguments: Sequence[Any]) -> list[Tensor]:
        return self.case.exact(arguments)

    def allowed(self) -> float:
        return self.case.allowed()

    def precision_set(self) -> AbstractContextManager[None]:
        return self.case.workload.precision_set()


@dataclass(frozen=True)
class UserCall:
    """A call of `functional`, its backward included. `call` takes the arguments and the backend; the
    tensors of floating point among them are trained where it asks for their gradients."""

    name: str
    dtype: torch.dtype
    make: Callable[[], list[Any]]
    call: Callable[[list[Any], str], list[Tensor]]
    backend: str = "triton"
    by_address: bool = False

    def arguments(self) -> Sequence[Any]:
        return self.make()

    def others(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return arguments if self.by_address else self.make()

    def run(self, arguments: Sequence[Any]) -> list[Tensor]:
        return self.call(list(arguments), self.backend)

    def exact(self, arguments: Sequence[Any]) -> list[Tensor]:
        return self.call([_double(value) for value in arguments], "reference")

    def allowed(self) -> float:
        return PRECISIONS["highest"] if self.dtype == torch.float32 else TOLERANCES[self.dtype]

    def precision_set(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        made = value.detach().double() if value.is_floating_point() else value.clone()
        return made.requires_grad_(value.requires_grad)
    return [_double(one) for one in value] if isinstance(value, list) else value


def user_calls(dtype: torch.dtype) -> list[UserCall]:
    """Every function of `functional` that launches, at ragged shapes."""

    def linear(key: str) -> UserCall:
        def call(given: list[Any], backend: str) -> list[Tensor]:
            x, weight, bias, a, b, scale, dy = given
            y = FE.lora_linear(x, weight, bias, a, b, scale, backend=backend)
            return [y, *torch.autograd.grad(y, [x, bias, a, b, scale], dy)]

        return UserCall(f"FE.lora_linear, {key}", dtype, lambda: _linear(dtype), call, f"triton:{key}")

    found = [linear(key) for key in ("full", "prologue", "addmm", "concat")]
    made = {
        "lora_linear_slices": (_slices, _call_slices, False),
        "ewc_penalty": (_penalty, _call_penalty, True),
        "ewc_penalty_grad_": (_penalty, _call_penalty_grad, True),
        "l1_penalty": (_pairs, _call_l1, True),
        "fisher_accumulate_": (_fisher, _call_fisher, False),
        "merge_": (_merge, _call_merge, False),
        "soft_threshold_": (_threshold, _call_threshold, False),
    }
    for name, (make, call, by_address) in made.items():
        found.append(
            UserCall(f"FE.{name}", dtype, lambda make=make: make(dtype), call, "triton", by_address)  # type: ignore[misc]
        )
    return found


class _Make:
    """Tensors of a fixed seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(3)

    def __call__(self, *shape: int, std: float = 1.0, trained: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * std
        return values.to(self.dtype).requires_grad_(trained)


ROWS, D_IN, D_OUT, RANK = (3, 53), 176, 208, 10


def _linear(dtype: torch.dtype) -> list[Any]:
    make = _Make(dtype)
    return [
        make(*ROWS, D_IN, trained=True), make(D_OUT, D_IN, std=D_IN**-0.5), make(D_OUT, trained=True),
        make(RANK, D_IN, std=D_IN**-0.5, trained=True), make(D_OUT, RANK, std=RANK**-0.5, trained=True),
        make(RANK, trained=True), make(*ROWS, D_OUT),
    ]  # fmt: skip


def _slices(dtype: torch.dtype) -> list[Any]:
    make = _Make(dtype)
    pairs = [[make(r, D_IN, std=D_IN**-0.5, trained=True), make(64, r, trained=True)] for r in (3, 8)]
    return [make(*ROWS, D_IN, trained=True), make(D_OUT, D_IN, std=D_IN**-0.5), pairs, make(*ROWS, D_OUT)]


def _call_slices(given: list[Any], backend: str) -> list[Tensor]:
    x, weight, pairs, dy = given
    places = ((16, 80), (112, 176))
    slices = [(start, stop, a, b, 0.5) for (start, stop), (a, b) in zip(places, pairs, strict=True)]
    y = FE.lora_linear_slices(x, weight, None, slices, backend=backend)
    return [y, *torch.autograd.grad(y, [x, *(t for pair in pairs for t in pair)], dy)]


PENALTIES = ((D_OUT, D_IN), (D_IN, D_OUT - 3), (33, 48))


def _pairs(dtype: torch.dtype) -> list[Any]:
    make = _Make(dtype)
    return [[make(RANK, d_in, trained=True), make(d_out, RANK, trained=True)] for d_out, d_in in PENALTIES]


def _penalty(dtype: torch.dtype) -> list[Any]:
    make = _Make(torch.float32)
    return [[make(*shape).abs() for shape in PENALTIES], _pairs(dtype)]


def _call_penalty(given: list[Any], backend: str) -> list[Tensor]:
    fishers, pairs = given
    lora_as, lora_bs = zip(*pairs, strict=True)
    loss = FE.ewc_penalty(fishers, lora_as, lora_bs, ewc_lambda=2.0, backend=backend)
    return [loss, *torch.autograd.grad(loss, [*lora_as, *lora_bs])]


def _call_penalty_grad(given: list[Any], backend: str) -> list[Tensor]:
    fishers, pairs = given
    lora_as, lora_bs = zip(*pairs, strict=True)
    for t in (*lora_as, *lora_bs):
        t.grad = None
    loss = FE.ewc_penalty_grad_(fishers, lora_as, lora_bs, ewc_lambda=2.0, grad_scale=0.5, backend=backend)
    return [loss, *(t.grad for t in (*lora_as, *lora_bs) if t.grad is not None)]


def _call_l1(given: list[Any], backend: str) -> list[Tensor]:
    lora_as, lora_bs = zip(*given, strict=True)
    loss = FE.l1_penalty(lora_as, lora_bs, l1_lambda=2.0, backend=backend)
    return [loss, *torch.autograd.grad(loss, [*lora_as, *lora_bs])]


def _fisher(dtype: torch.dtype) -> list[Any]:
    make = _Make(dtype)
    return [make(D_OUT, D_IN).float().abs(), make(*ROWS, D_IN), make(*ROWS, D_OUT)]


def _call_fisher(given: list[Any], backend: str) -> list[Tensor]:
    return [FE.fisher_accumulate_(*given, weight=3.0, backend=backend)]


def _merge(dtype: torch.dtype) -> list[Any]:
    make = _Make(dtype)
    return [make(D_OUT, D_IN), make(RANK, D_IN), make(D_OUT, RANK)]


def _call_merge(given: list[Any], backend: str) -> list[Tensor]:
    return [FE.merge_(*given, 0.5, backend=backend)]


def _threshold(dtype: torch.dtype) -> list[Any]:
    return [_Make(dtype)(RANK), 0.3]


def _call_threshold(given: list[Any], backend: str) -> list[Tensor]:
    with use_backend(backend):
        return [FE.soft_threshold_(*given)]


def host_calls(arch: str, dtypes: Sequence[torch.dtype], ranks: Sequence[int]) -> Iterator[HostCall]:
    return map(HostCall, cases(arch, dtypes, ranks))


@contextlib.contextmanager
def pretending(arch: str) -> Iterator[None]:
    """The CPU stands in for a GPU of `arch`; plans launch through the stand-in that Triton's launcher has.
    Hosts make their tables anew."""
    backend.pretend(arch, str(stub.shared().path))
    backend.forget_tables()
    try:
        yield
    finally:
        backend.pretend(None)


def record(call: Call, arguments: Sequence[Any]) -> None:
    """Calls that make a plan; tensors keep their values."""
    before = [tensor.detach().clone() for tensor in tensors(list(arguments))]
    for _ in range(2):
        call.run(arguments)
    with torch.no_grad():
        for tensor, old in zip(tensors(list(arguments)), before, strict=True):
            tensor.copy_(old)
