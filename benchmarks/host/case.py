# SPDX-License-Identifier: Apache-2.0
"""A call whose host time is measured, and who makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from ..case import OURS, Run, Target

Truth = Callable[[], Sequence[Tensor]]
CHECKED, NOT_COMPUTED, NOT_COMPARED = "checked", "not computed", "not compared"


@dataclass(frozen=True)
class Caller:
    """One way to make the call of a case.

    make: returns the call, ready to be repeated; raises `Unavailable` with the reason where it cannot be had.
    using: a context around calls, which is not timed.
    check: returns the results to compare with the truth, where the call does not.
    results: whether they are compared with fp64, are not computed (kernels that are not launched), or belong
    to another computation (a floor, an adapter elsewhere).
    truth: of this caller, where it computes something else than the case.
    """

    name: str
    make: Callable[[], Run]
    role: str = "peer"
    backend: str = ""
    algorithm: str = ""
    using: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    check: Run | None = None
    results: str = CHECKED
    truth: Truth | None = None


@dataclass(frozen=True)
class HostCase:
    """A call and its callers. `truth` computes the fp64 results that they must match to `tolerance`
    (relative, in the norm of each result)."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    callers: Sequence[Caller]
    truth: Truth
    tolerance: float
    targets: Sequence[Target] = ()
    ours: str = OURS

    def __str__(self) -> str:
        fields = (str(v) if str(v).startswith(k) else f"{k} {v}" for k, v in self.shape.items())
        return f"{self.op}  {', '.join(fields)}  {self.dtype}"
