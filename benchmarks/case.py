# SPDX-License-Identifier: Apache-2.0
"""What is measured: an operation at a shape, its providers, and its targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .workload import Workload

Run = Callable[[], Sequence[Tensor]]

OURS = "fused_ewclora"
ROLES = ("ours", "variant", "peer", "floor")


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    role: "ours" is this library, which targets refer to; a "variant" is this library with a forced backend or
    algorithm; a "floor" is work of equal size with another result (a plain product, a frozen layer), which is
    not checked.
    rotation: the same computation on other buffers; `run` and these are timed in turns, so that no buffer is
    still in cache when it is used again.
    check: returns the results to compare with the truth, where `run` does not.
    """

    name: str
    run: Run
    role: str = "peer"
    backend: str = ""
    algorithm: str = ""
    rotation: Sequence[Run] = ()
    check: Run | None = None
    predicted: float | None = None  # seconds by a model, never measured


@dataclass(frozen=True)
class Target:
    """ours <= limit * peer + allowance, for the medians or another `metric` of the records.

    "4 x faster" is a limit of 1/4. The peer "best peer" is the smallest value of all peers; without a peer
    (None) the allowance alone is the bound.
    """

    peer: str | None
    limit: float
    name: str
    metric: str = "p50"
    allowance: float = 0.0


@dataclass(frozen=True)
class Case:
    """An operation at a shape. `truth` computes the fp64 results that every provider must match to
    `tolerance` (relative, in the norm of each result). `floor_bytes` adds a floor that is computed, not run:
    the time of this many bytes at the measured copy bandwidth."""

    op: str
    shape: dict[str, int | str]
    dtype: str
    flops: float
    bytes: float
    providers: Sequence[Provider]
    truth: Callable[[], Sequence[Tensor]]
    tolerance: float
    targets: Sequence[Target] = field(default_factory=tuple)
    ours: str = OURS
    product: str = "fp32"  # which measured product rate bounds the arithmetic
    precision: str | None = None  # torch.set_float32_matmul_precision while the case runs
    floor_bytes: float | None = None

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        providers: Sequence[Provider],
        truth: Callable[[], Sequence[Tensor]],
        tolerance: float,
        **others: Any,
    ) -> Case:
        """The case of a workload, which decides operation, shape, dtype, FLOPs and bytes; `others` are the
        remaining fields."""
        work = workload.work
        return cls(
            workload.op, workload.shape, workload.dtype, work.flops, work.bytes, providers, truth, tolerance,
            **others,
        )  # fmt: skip
