# SPDX-License-Identifier: Apache-2.0
"""Small calls of every op of csrc/cuda that the machine executes, against fp64: those of benchmarks/gpu."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu import small_calls
from benchmarks.harness import error_to_truth, matmul_precision

from .cuda_launches import Session, executing

# Whose samples blocks share, which take turns at F, or add up sums of several tiles.
SPLIT = small_calls.Call(
    "fisher_accumulate_, in splits", functools.partial(small_calls.fisher, samples=32, tokens=60), 2e-2
)
SPLIT_SUMS = small_calls.Call(
    "fisher_sums_, in splits",
    functools.partial(small_calls.fisher, factored=True, samples=8, tokens=60, d_in=140),
    2e-2,
)


def calls() -> list[small_calls.Call]:
    """All calls."""
    return [*small_calls.calls(), SPLIT, SPLIT_SUMS]


@dataclass
class Outcome:
    """One call, executed."""

    case: str
    session: Session
    error: float
    allowed: float
    bits: str  # a digest of the results

    @property
    def findings(self) -> list[str]:
        return self.session.findings()

    @property
    def right(self) -> bool:
        return self.error <= self.allowed and not self.findings


def names() -> list[str]:
    """Of all calls."""
    return [call.name for call in calls()]


def execute(name: str, session: Session) -> Outcome:
    """Executes the call of this name."""
    call = next(call for call in calls() if call.name == name)
    truth = _results(call.method(small_calls.Values("cpu", True), "reference"))
    with matmul_precision(call.precision), executing(session):
        got = _results(call.method(small_calls.Values("cpu", False), "cuda"))
    digest = hashlib.sha256()
    for tensor in got:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    error = error_to_truth(got, truth)
    return Outcome(name, session, error, call.tolerance, digest.hexdigest()[:16])


def _results(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]
