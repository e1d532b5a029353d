# SPDX-License-Identifier: Apache-2.0
"""Where cases run: which of our backends are measured, how many buffers, and how peers are compiled."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import fused_ewclora as fe

from . import extras
from .case import OURS, Run
from .workload import LATER

CUDA = f"{OURS} cuda"  # the CUDA backend, where it is built, as a variant of the same case
AGAIN = f"{OURS}, again"  # ours, measured a second time with the later part of its case
MOST_COPIES = 64


class Entry(NamedTuple):
    """One of our backends as a provider. `backend` is the argument of calls, None to let the library choose;
    `recorded` is the name of the backend in records. Or a `function` of the user in place of ours."""

    name: str
    role: str
    backend: str | None
    recorded: str
    function: Callable[..., Any] | None = None

    def of(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """How this provider computes an op of the library: a function with the signature of that op."""
        return self.function or functools.partial(op, backend=self.backend)

    def described(self, algorithm: str) -> str:
        """The algorithm in records, which for a function of the user is not known."""
        return algorithm if self.function is None else ""

    def using(self) -> AbstractContextManager[object]:
        """A context in which calls without a `backend`, such as those of modules, use this one."""
        return contextlib.nullcontext() if self.backend is None else fe.use_backend(self.backend)


@dataclass(frozen=True)
class Place:
    """A device. A rehearsal runs the cases of a GPU with tiny shapes on the CPU, in Triton's interpreter,
    only to show that they run."""

    device: str = "cpu"
    rehearsal: bool = False
    own: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # functions of the user, by their name

    @property
    def gpu(self) -> bool:
        """Whether the cases are those of a GPU, also in a rehearsal."""
        return self.device == "cuda" or self.rehearsal

    @property
    def single(self) -> str:
        """The product rate that bounds fp32 data."""
        return "tf32" if self.gpu else "fp32"

    def product(self, dtype: torch.dtype) -> str:
        """The product rate that bounds data of this dtype."""
        return "bf16" if dtype == torch.bfloat16 else self.single

    def entries(self, part: str) -> list[Entry]:
        """Our providers, then the functions of the user."""
        return [*self._ours(part), *(Entry(name, "peer", None, "", made) for name, made in self.own.items())]

    def _ours(self, part: str) -> list[Entry]:
        """On a GPU "ours" is Triton; the CUDA backend is a variant where it is built."""
        reasons = fe.available_backends()
        if not self.gpu:
            return [Entry(OURS, "ours", None, "cpu" if reasons["cpu"] is None else "reference")]
        if part == LATER:
            return [Entry(AGAIN, "variant", "triton", "triton")]
        cuda = [Entry(CUDA, "variant", "cuda", "cuda")] if reasons["cuda"] is None else []
        return [Entry(OURS, "ours", "triton", "triton"), *cuda]

    def copies(self, working_set: float) -> int:
        """The number of sets of buffers that fill three times the L2 cache of a GPU; 1 on a CPU, where one
        set is used repeatedly, as in training."""
        if self.device != "cuda":
            return 1
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26)
        return min(MOST_COPIES, max(1, math.ceil(3 * cache / max(working_set, 1.0))))

    def compiled(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for static shapes; a rehearsal only traces."""
        return extras.compiled(method, backend="eager") if self.rehearsal else extras.compiled(method)


def turns(make: Callable[[Any], Run], buffers: Sequence[Any]) -> dict[str, Any]:
    """`run` and `rotation` of a provider, over all sets of buffers."""
    first, *others = [make(inputs) for inputs in buffers]
    return {"run": first, "rotation": tuple(others)}
