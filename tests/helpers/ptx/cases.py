# SPDX-License-Identifier: Apache-2.0
"""Calls that the machine executes: every op by every algorithm, at small ragged shapes, against fp64.

The kinds are those of the compile report's workloads, so that every configuration in use is compiled as a
user's call would compile it; only sizes are smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu.small_calls import SIGNS
from fused_ewclora.backends import reference
from fused_ewclora.backends.candidate import Candidate
from fused_ewclora.backends.triton import has_penalty
from fused_ewclora.backends.triton.tools.workloads import Make, Sizes, Workload, workloads

from .launches import Session, executing, tensors
from .machine import Report

# Rows, tokens and widths that no block size divides; widths that vector loads and tensor maps can address.
SMALL = Sizes(samples=3, tokens=53, width=176, hidden=208, layers=3)
MANY_SAMPLES = SMALL._replace(samples=40, tokens=21)  # so many that the Fisher splits them
IN_PLACE = {"fisher_accumulate_": (0,), "fisher_sums_": (0, 1), "merge_": (0,), "soft_threshold_": (0,)}
# Relative error in norm: products of rounded operands, results rounded once.
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
PRECISIONS = {"highest": 2e-6, "high": 1e-3, "medium": 8e-3}


class Executed(Protocol):
    """Launches that were executed."""

    arch: str
    reports: list[Report]

    def findings(self) -> list[str]: ...


@dataclass
class Outcome:
    """One case on one architecture."""

    arch: str
    case: str
    session: Executed
    error: float
    allowed: float
    bits: str  # a digest of the results
    findings: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return self.error <= self.allowed and not self.findings


@dataclass(frozen=True)
class Case:
    workload: Workload
    candidate: Candidate

    @property
    def name(self) -> str:
        key = f" by {self.candidate.keys[0]}" if self.candidate.keys else ""
        return self.workload.name + key

    def allowed(self) -> float:
        dtype = self.workload.dtype
        fine = PRECISIONS[self.workload.precision] if dtype == torch.float32 else TOLERANCES[dtype]
        if self.workload.op.endswith("_penalty"):  # fp32 inside, by the matmul precision
            fine = PRECISIONS[self.workload.precision]
        if self.workload.op == "l1_penalty":
            fine += SIGNS[self.workload.precision]
        return fine

    def execute(self, session: Session) -> Outcome:
        arguments = self.arguments()
        exact = self.exact(arguments)
        with self.workload.precision_set(), executing(session, *arguments):
            got = self.run(arguments)
        return self.outcome(session, got, exact)

    def arguments(self) -> tuple[Any, ...]:
        return self.workload.make(Make("cpu"))

    def exact(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The results in fp64; `arguments` stay as they are."""
        return _results(self.workload.op, reference.candidates(self.workload.op)[0], _double(list(arguments)))

    def run(self, arguments: Sequence[Any]) -> list[Tensor]:
        return _results(self.workload.op, self.candidate, list(arguments))

    def outcome(self, session: Executed, got: list[Tensor], exact: list[Tensor]) -> Outcome:
        errors = [error_of(a, b) for a, b in zip(got, exact, strict=True)]
        digest = hashlib.sha256()
        for tensor in got:
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Outcome(
            session.arch, self.name, session, max(errors), self.allowed(), digest.hexdigest()[:16],
            session.findings(),
        )  # fmt: skip


def cases(
    arch: str,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    ranks: Sequence[int] = (10,),
    sizes: Sizes = SMALL,
) -> Iterator[Case]:
    """Every kind of workload by every algorithm that can compute it."""
    split = [
        replace(w, kind=f"{w.kind}, in splits")
        for w in workloads(dtypes, (), MANY_SAMPLES)
        if w.kind in ("sample", "sample, cu_seqlens")
    ]
    for workload in [*workloads(dtypes, ranks, sizes), *split]:
        with workload.precision_set():
            if workload.op.endswith("_penalty") and not has_penalty(workload.rank, arch, workload.op):
                continue
        for candidate in workload.candidates():
            yield Case(workload, candidate)


def _results(op: str, candidate: Candidate, arguments: list[Any]) -> list[Tensor]:
    returned = candidate.run(*arguments)
    if op in IN_PLACE:
        return list(tensors([arguments[i] for i in IN_PLACE[op]]))
    return list(tensors(list(returned) if isinstance(returned, (tuple, list)) else [returned]))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return [_double(one) for one in value]
    return value


def error_of(got: Tensor, exact: Tensor) -> float:
    difference = (got.double() - exact).norm()
    size = exact.norm()
    return float(difference / size) if size else float(difference)
