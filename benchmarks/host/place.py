# SPDX-License-Identifier: Apache-2.0
"""Where calls run: on a GPU, or on a CPU that stands in for one whose launches do nothing.

Without a GPU, Triton serves CPU tensors when it is asked for by name, up to the launch: its results are
memory that nothing has written. The other backends and the peers compute, on tensors so small that it costs
little.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

import fused_ewclora as fe
from fused_ewclora.backends import native, triton
from fused_ewclora.backends.triton import launch, plans
from fused_ewclora.errors import BackendError
from fused_ewclora.ops import dispatch

from ..algorithms import OF_TRITON
from ..case import OURS, Run
from ..extras import Unavailable
from .case import CHECKED, NOT_COMPUTED

ARCH = "sm_90"  # what the CPU stands in for


@dataclass(frozen=True)
class Entry:
    """One of our backends as a caller; `backend` may name an algorithm, "triton:full". `missing` says why
    there is none."""

    name: str
    role: str
    backend: str
    results: str
    missing: str | None

    def using(self) -> AbstractContextManager[object]:
        """Calls inside use this backend."""
        self.require()
        return fe.use_backend(self.backend)

    def require(self) -> None:
        """Raises `Unavailable` where the backend is missing."""
        if self.missing is not None:
            raise Unavailable(self.missing)


@dataclass(frozen=True)
class HostPlace:
    """The device of the tensors. `arch` is what the CPU stands in for; None on a GPU, and where it cannot,
    for the reason `refused`."""

    device: str
    arch: str | None = None
    refused: str | None = None

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def entries(self, algorithms: bool = False) -> list[Entry]:
        """Our backends; Triton is "ours". `algorithms`: also each algorithm of its LoRA linear."""
        reasons = dict(fe.available_backends())
        if self.refused is not None:
            reasons["triton"] = self.refused
        names = ["triton", *(f"triton:{key}" for key in (OF_TRITON if algorithms else ()))]
        names += ["cuda" if self.gpu else "cpu", "reference"]
        found = []
        for name in names:
            backend = name.partition(":")[0]
            results = NOT_COMPUTED if backend == "triton" and not self.gpu else CHECKED
            ours = name == "triton"
            title = OURS if ours else f"{OURS} {name}"
            role = "ours" if ours else "variant"
            found.append(Entry(title, role, name, results, reasons[backend]))
        return found

    def observed(self, run: Run) -> tuple[int | None, str]:
        """Triton launches of one call, and the algorithms that were chosen.

        Plans count their launches. Those of Triton's own launcher are counted on the CPU, instead of being
        made; None on a GPU, where those of a backward pass come from another thread.
        """
        algorithms: dict[str, str] = {}

        def note(op: str, candidate: dispatch.Candidate) -> dispatch.Candidate:
            algorithms[op] = candidate.algorithm
            return candidate

        before = dispatch.annotate(note)
        try:
            count = self._launches(run)
        finally:
            dispatch.annotate(before)
        return count, "; ".join(dict.fromkeys(algorithms.values()))

    def _launches(self, run: Run) -> int | None:
        if plans.unavailable() is None:
            counter: Any = native.extension()
            begin = counter.launches()
            run()
            if made := int(counter.launches() - begin):
                return made
        if self.arch is None:
            run()
            return None
        with launch.noting(self.arch) as noted:
            run()
        return len(noted)

    @property
    def launcher(self) -> str:
        """Who launches, for records."""
        if self.refused is not None:
            return f"nobody: {self.refused}"
        reason = plans.unavailable()
        return "plans" if reason is None else f"Triton's own, since plans are not available: {reason}"


@contextlib.contextmanager
def place() -> Iterator[HostPlace]:
    """The GPU if there is one, otherwise the CPU, which stands in for one inside the context."""
    if torch.cuda.is_available():
        yield HostPlace("cuda")
        return
    try:
        triton.pretend(ARCH)
    except BackendError as refused:  # Triton's interpreter is on
        yield HostPlace("cpu", None, str(refused))
        return
    try:
        yield HostPlace("cpu", ARCH)
    finally:
        triton.pretend(None)
