"""Calls of hosts through plans (fused_ewclora/backends/triton/plans.py), on the stand-in for the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ptx.cases import Case
from torch import Tensor

from fused_ewclora.backends import triton as backend
from fused_ewclora.backends.triton import plans

from . import stub


@contextlib.contextmanager
def pretending(arch: str) -> Iterator[None]:
    """The CPU stands in for a GPU of `arch`; plans launch through the stand-in that Triton's launcher has."""
    backend.pretend(arch, str(stub.shared().path))
    try:
        yield
    finally:
        backend.pretend(None)


def others(case: Case, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of the same kind at other addresses, where no table holds addresses, with other numbers."""
    op = case.workload.op
    made = list(arguments if op in plans.BY_ADDRESS else case.arguments())
    for place in plans.NUMBERS.get(op, ()):
        made[place] *= 1.75
    return tuple(made)


def record(case: Case, arguments: Sequence[Any]) -> None:
    """Calls that make a plan; tensors keep their values."""
    before = copied(arguments)
    for _ in range(2):
        case.candidate.run(*arguments)
    restore(arguments, before)


def copied(value: Any) -> Any:
    """Tensors in `value` as they are now."""
    if isinstance(value, (list, tuple)):
        return [copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def restore(value: Any, before: Any) -> None:
    """Tensors in `value` get back what they held."""
    if isinstance(value, (list, tuple)):
        for one, old in zip(value, before, strict=True):
            restore(one, old)
    elif isinstance(value, Tensor):
        value.copy_(before)
