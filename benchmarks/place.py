"""Where cases run: which of our backends are measured, how many buffers, and how peers are compiled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
    `recorded` is the name of the backend in records."""

    name: str
    role: str
    backend: str | None
    recorded: str

    def using(self) -> AbstractContextManager[object]:
        """A context in which calls without a `backend`, such as those of modules, use this one."""
        return contextlib.nullcontext() if self.backend is None else fe.use_backend(self.backend)


@dataclass(frozen=True)
class Place:
    """A device. A rehearsal runs the cases of a GPU with tiny shapes on the CPU, in Triton's interpreter,
    only to show that they run."""

    device: str = "cpu"
    rehearsal: bool = False

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
        """Our providers. On a GPU "ours" is Triton; the CUDA backend is a variant where it is built."""
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
